"""A rank's journal as tensors, to be stored in its file of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch, Ragged, concat
from spmdrl.memory.json_tensors import json_tensor, tensor_json
from spmdrl.roles.kept import Journal, Kept, Origin, PartialResult, Record

PREFIX = "journal/"
_CONTENTS = PREFIX + "contents"
_FORMAT = 2

log = logging.getLogger(__name__)


def pack_journal(journal: Journal) -> dict[str, Tensor]:
    """The journal as named tensors, one of which holds all other values as JSON."""
    tensors: dict[str, Tensor] = {}
    calls = [_pack_call(k, f"{PREFIX}{n}", tensors) for n, k in enumerate(journal.calls)]
    return {**tensors, _CONTENTS: json_tensor({"format": _FORMAT, "calls": calls})}


def unpack_journal(tensors: Mapping[str, Tensor]) -> Journal:
    """Rebuild the journal that `pack_journal` was given; an empty one if none was packed, or if an
    older version packed it.
    """
    if _CONTENTS not in tensors:
        return Journal()
    contents = tensor_json(tensors[_CONTENTS])
    if contents.get("format") != _FORMAT:
        log.warning("calls of the step that an older version has kept are made anew")
        return Journal()
    calls = enumerate(contents["calls"])
    return Journal(calls=tuple(_unpack_call(k, f"{PREFIX}{n}", tensors) for n, k in calls))


def merge_journals(journals: Sequence[Journal], *, same_homes: bool, own: Journal) -> Journal:
    """Merge the journals of all ranks that wrote a checkpoint, for a rank of another layout.

    Rows of stopped calls are joined, and no state of a rank survives.

    Args:
        same_homes: there are as many ranks as before, so rows keep their home ranks.
        own: this rank's journal among them, if `same_homes`.
    """
    calls = []
    for number, found in enumerate(zip(*(journal.calls for journal in journals), strict=True)):
        records = [kept.record for kept in found if kept.record is not None]
        if not records:
            parts = [kept.part for kept in found if kept.part is not None]
            calls.append(replace(found[0], part=_merge_parts(parts)))
        elif same_homes:
            calls.append(own.calls[number])
        elif found[0].is_foreign or records[0].rows is None:
            calls.append(found[0])
        else:
            calls.append(replace(found[0], record=_merge_records(records), is_foreign=True))
    return Journal(calls=tuple(calls))


def _merge_records(records: Sequence[Record]) -> Record:
    places = [record.places for record in records if record.places is not None]
    return Record(
        rows=_join([record.rows for record in records]),
        places=torch.cat(places) if len(places) == len(records) else None,
    )


def _merge_parts(parts: Sequence[PartialResult]) -> PartialResult:
    values = [part.values for part in parts if part.values is not None]
    return PartialResult(
        rows=_join([part.rows for part in parts]), values=values[0] if values else None
    )


def _join(batches: Sequence[Batch | None]) -> Batch | None:
    given = [batch for batch in batches if batch is not None]
    if not given:
        return None
    # finished calls have more columns than stopped ones
    names = set.intersection(*(set(batch.columns()) for batch in given))
    return concat([batch.keep(sorted(names)) for batch in given])


def _pack_call(kept: Kept, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": kept.name,
        "step": kept.step,
        "settings": kept.origin.settings,
        "sums": list(kept.origin.sums),
        "writes": kept.writes,
        "is_ahead": kept.is_ahead,
        "is_foreign": kept.is_foreign,
        "record": None,
        "part": None,
    }
    if (record := kept.record) is not None:
        rows = _pack_rows(record.rows, name, tensors)
        if record.places is not None:
            tensors[f"{name}/places"] = record.places
        found["record"] = {"rows": rows, "values": record.values}
    if (part := kept.part) is not None:
        rows = _pack_rows(part.rows, name, tensors)
        tensors |= {f"{name}/state/{k}": tensor for k, tensor in part.state.items()}
        found["part"] = {"rows": rows, "values": part.values, "state": list(part.state)}
    return found


def _unpack_call(found: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Kept:
    record, part = None, None
    if (kept := found["record"]) is not None:
        record = Record(
            rows=_unpack_rows(kept["rows"], name, tensors),
            places=tensors.get(f"{name}/places"),
            values=kept["values"],
        )
    if (kept := found["part"]) is not None:
        part = PartialResult(
            rows=_unpack_rows(kept["rows"], name, tensors),
            values=kept["values"],
            state={key: tensors[f"{name}/state/{key}"] for key in kept["state"]},
        )
    return Kept(
        name=found["name"],
        step=found["step"],
        origin=Origin(settings=found["settings"], sums=tuple(found["sums"])),
        writes=found["writes"],
        is_ahead=found["is_ahead"],
        is_foreign=found["is_foreign"],
        record=record,
        part=part,
    )


def _pack_rows(rows: Batch | None, name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if rows is None:
        return None
    tensors[f"{name}/lengths"] = rows.lengths
    tensors |= {f"{name}/tokens/{column}": values for column, values in rows.tokens.items()}
    tensors |= {f"{name}/rows/{column}": values for column, values in rows.rows.items()}
    for column, ragged in rows.ragged.items():
        tensors[f"{name}/ragged/{column}/counts"] = ragged.counts
        tensors[f"{name}/ragged/{column}/values"] = ragged.values
    return {"tokens": list(rows.tokens), "rows": list(rows.rows), "ragged": list(rows.ragged)}


def _unpack_rows(
    columns: Mapping[str, Any] | None, name: str, tensors: Mapping[str, Tensor]
) -> Batch | None:
    if columns is None:
        return None
    return Batch(
        lengths=tensors[f"{name}/lengths"],
        tokens={column: tensors[f"{name}/tokens/{column}"] for column in columns["tokens"]},
        rows={column: tensors[f"{name}/rows/{column}"] for column in columns["rows"]},
        ragged={
            column: Ragged(
                counts=tensors[f"{name}/ragged/{column}/counts"],
                values=tensors[f"{name}/ragged/{column}/values"],
            )
            # journals of older versions have none
            for column in columns.get("ragged", ())
        },
    )
