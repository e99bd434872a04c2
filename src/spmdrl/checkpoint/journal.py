"""A rank's journal as tensors, to be kept in its file of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch, concat
from spmdrl.ledger import Journal, Part, Record
from spmdrl.storages import json_tensor, tensor_json

PREFIX = "journal/"
_CONTENTS = PREFIX + "contents"


def pack_journal(journal: Journal) -> dict[str, Tensor]:
    """All of it by name: tensors, and one that holds the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    records, parts = [], []
    for number, (key, record) in enumerate(journal.records.items()):
        name = f"{PREFIX}record/{number}"
        rows = _pack_rows(record.rows, name, tensors)
        if record.places is not None:
            tensors[f"{name}/places"] = record.places
        records.append({"key": key, "step": record.step, "rows": rows, "values": record.values})
    for number, (key, part) in enumerate(journal.parts.items()):
        name = f"{PREFIX}part/{number}"
        rows = _pack_rows(part.rows, name, tensors)
        tensors |= {f"{name}/state/{k}": tensor for k, tensor in part.state.items()}
        parts.append({"key": key, "rows": rows, "values": part.values, "state": list(part.state)})
    return {**tensors, _CONTENTS: json_tensor({"records": records, "parts": parts})}


def unpack_journal(tensors: Mapping[str, Tensor]) -> Journal:
    """What `pack_journal` was given; an empty one where none was packed."""
    if _CONTENTS not in tensors:
        return Journal()
    contents = tensor_json(tensors[_CONTENTS])
    records, parts = {}, {}
    for number, found in enumerate(contents["records"]):
        name = f"{PREFIX}record/{number}"
        records[found["key"]] = Record(
            step=found["step"],
            rows=_unpack_rows(found["rows"], name, tensors),
            places=tensors.get(f"{name}/places"),
            values=found["values"],
        )
    for number, found in enumerate(contents["parts"]):
        name = f"{PREFIX}part/{number}"
        parts[found["key"]] = Part(
            rows=_unpack_rows(found["rows"], name, tensors),
            values=found["values"],
            state={key: tensors[f"{name}/state/{key}"] for key in found["state"]},
        )
    return Journal(records=records, parts=parts)


def merge_journals(journals: Sequence[Journal], *, same_homes: bool, own: Journal) -> Journal:
    """The journals of all ranks that wrote a checkpoint, for a rank of another layout.

    Rows of calls that were stopped are put together, and no state of a rank survives.

    Args:
        same_homes: there are as many ranks as before: what was home stays so.
        own: of this rank among them, if `same_homes`.
    """
    records = dict(own.records)
    if not same_homes:
        for key in journals[0].records:
            found = [journal.records[key] for journal in journals]
            places = [record.places for record in found if record.places is not None]
            records[key] = Record(
                step=found[0].step,
                rows=_join([record.rows for record in found]),
                places=torch.cat(places) if len(places) == len(found) else None,
                values=found[0].values,
            )
    keys = dict.fromkeys(key for journal in journals for key in journal.parts)
    parts = {}
    for key in keys:
        left = [journal.parts[key] for journal in journals if key in journal.parts]
        values = [part.values for part in left if part.values is not None]
        parts[key] = Part(
            rows=_join([part.rows for part in left]), values=values[0] if values else None
        )
    return Journal(records=records, parts=parts, is_foreign=not same_homes)


def _join(batches: Sequence[Batch | None]) -> Batch | None:
    given = [batch for batch in batches if batch is not None]
    if not given:
        return None
    # what was finished carries more columns than what was stopped
    names = set.intersection(*(set(batch.columns()) for batch in given))
    return concat([batch.keep(sorted(names)) for batch in given])


def _pack_rows(rows: Batch | None, name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if rows is None:
        return None
    tensors[f"{name}/lengths"] = rows.lengths
    tensors |= {f"{name}/tokens/{column}": values for column, values in rows.tokens.items()}
    tensors |= {f"{name}/rows/{column}": values for column, values in rows.rows.items()}
    return {"tokens": list(rows.tokens), "rows": list(rows.rows)}


def _unpack_rows(
    columns: Mapping[str, Any] | None, name: str, tensors: Mapping[str, Tensor]
) -> Batch | None:
    if columns is None:
        return None
    return Batch(
        lengths=tensors[f"{name}/lengths"],
        tokens={column: tensors[f"{name}/tokens/{column}"] for column in columns["tokens"]},
        rows={column: tensors[f"{name}/rows/{column}"] for column in columns["rows"]},
    )
