"""Random layouts (hypothesis strategies), and a sync carried out in memory, message by message."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from hypothesis import strategies as st
from torch import Tensor
from weight_cases import model, tensors_of, values

from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Slice, global_shapes
from spmdrl.weights.layout import Held, Table, WeightLayout, model_layout
from spmdrl.weights.places import Places
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.program import Message, RankRound, program_of

MODELS = (
    model(num_attention_heads=12, num_key_value_heads=4, head_dim=2, intermediate_size=24,
          vocab_size=36, num_hidden_layers=3),
    model(num_attention_heads=12, num_key_value_heads=12, head_dim=2, vocab_size=60,
          intermediate_size=36, num_hidden_layers=2, tie_word_embeddings=True),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def pairs(draw: st.DrawFn, world_size: int) -> tuple[ModelConfig, WeightLayout, WeightLayout]:
    """A model with a source and a target layout somewhere in the world."""
    config = draw(st.sampled_from(MODELS))
    source = draw(st.one_of(parallel(config, world_size, True), boxes(config, world_size)))
    target = draw(st.one_of(parallel(config, world_size, False), boxes(config, world_size)))
    return config, source, target


@st.composite
def parallel(
    draw: st.DrawFn, config: ModelConfig, world_size: int, is_source: bool
) -> WeightLayout:
    """What backends (`pp`, `dp`, `cp`, `tp`) and engines (replicas of `tp`) hold."""
    most = world_size
    degrees = {}
    tps = [1, 2, 3, 4] if is_source else [1, 2, 3, 4, 6, 12]
    kv = config.num_kv_heads
    fitting = [n for n in tps if kv % n == 0 or (not is_source and n % kv == 0)]
    choices = {
        "tp": fitting,
        "dp_replicate": [1, 2, 3, 8],
        **({"dp_shard": [1, 2, 3, 4, 5], "pp": [1, 2], "cp": [1, 2]} if is_source else {}),
    }
    for axis, options in choices.items():
        degrees[axis] = draw(st.sampled_from([n for n in options if n <= most]))
        most //= degrees[axis]
    count = 1
    for degree in degrees.values():
        count *= degree
    ranks = sorted(draw(st.permutations(range(world_size)))[:count])
    return model_layout(config, ranks, degrees, draw(st.sampled_from(DTYPES)))


@st.composite
def boxes(draw: st.DrawFn, config: ModelConfig, world_size: int) -> WeightLayout:
    """Every tensor cut anywhere, each box on any ranks: whatever a backend may bring."""
    tables: dict[int, dict[str, Held]] = {}
    dtype = draw(st.sampled_from(DTYPES))
    for name, shape in global_shapes(config).items():
        cuts = [
            sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape
        ]
        for at in product(*(range(len(bounds) - 1) for bounds in cuts)):
            start = tuple(bounds[i] for bounds, i in zip(cuts, at, strict=True))
            stop = tuple(bounds[i + 1] for bounds, i in zip(cuts, at, strict=True))
            piece = Slice(name=name, shape=shape, start=start, stop=stop, offset=0)
            held = Held(shape=piece.size, dtype=dtype, slices=(piece,))
            for rank in draw(st.sets(st.integers(0, world_size - 1), min_size=1, max_size=4)):
                tables.setdefault(rank, {})[f"{name}{list(start)}"] = held
    return tables


class Ledger:
    """What every rank holds or has received of every tensor."""

    def __init__(self, config: ModelConfig, source: WeightLayout) -> None:
        self._there: dict[tuple[int, str], Tensor] = {}
        self._shapes = global_shapes(config)
        for rank, table in source.items():
            for held in table.values():
                for piece in held.slices:
                    self._box(rank, piece.name, piece.start, piece.stop).fill_(True)

    def _box(self, rank: int, name: str, start: tuple[int, ...], stop: tuple[int, ...]) -> Tensor:
        new = torch.zeros(self._shapes[name], dtype=torch.bool)
        mask = self._there.setdefault((rank, name), new)
        return mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]

    def receive(self, rank: int, message: Message) -> int:
        """Note what came; it must be new to the rank. Returns its bytes."""
        for name, cell in message.items:
            box = self._box(rank, name, cell.start, cell.stop)
            assert not box.any(), f"rank {rank} got {name} {cell} that it had"
            box.fill_(True)
        return message.num_bytes


def simulate(
    config: ModelConfig, plan: SyncPlan, source: WeightLayout, target: WeightLayout
) -> int:
    """Carry out a plan for all ranks and check the targets; returns the bytes received."""
    whole = values(config)
    ranks = range(plan.world_size)
    nothing: Table = {}
    tensors = {r: tensors_of(source.get(r, nothing), whole) for r in ranks}
    filled = {
        r: {
            name: torch.zeros(held.shape, dtype=held.dtype)
            for name, held in target.get(r, nothing).items()
            if name not in plan.shared.get(r, ())
        }
        for r in ranks
    }
    places = {
        r: Places(
            {n: (tensors[r][n], held.slices) for n, held in source.get(r, nothing).items()},
            {n: (t, target[r][n].slices) for n, t in filled[r].items()},
            lambda tensor: tensor,
        )
        for r in ranks
    }
    rounds = (*plan.frozen_rounds, *plan.rounds)
    programs = {r: program_of(plan, rounds, r) for r in ranks}
    ledger, received = Ledger(config, source), 0
    for number in range(len(rounds)):
        parts = {r: programs[r][number] for r in ranks}
        received += _carry_out(parts, places, ledger)
        for part in parts.values():
            staged = [*part.sends, *part.receives, *part.casts]
            is_single = len({item for m in staged for item in m.items}) <= 1
            assert is_single or sum(m.num_bytes for m in staged) <= plan.slot_bytes
    for rank, table in target.items():
        for name, expected in tensors_of(table, whole).items():
            if name in plan.shared[rank]:
                assert torch.equal(tensors[rank][name], expected)
                continue
            # what was narrower at the source cannot have more digits here
            dtypes = {held.dtype for held in next(iter(source.values())).values()}
            assert torch.equal(
                filled[rank][name],
                expected.to(min(dtypes, key=_size)).to(expected.dtype)
                if expected.dtype.itemsize > min(map(_size, dtypes))
                else expected,
            )
    return received


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _carry_out(parts: Mapping[int, RankRound], places: Mapping[int, Places], ledger: Ledger) -> int:
    received = 0
    mail = {}
    for rank, part in parts.items():
        for name, cell in part.copies:
            value = places[rank].source(name, cell)
            assert value is not None
            for view in places[rank].target(name, cell):
                view.copy_(value)
        for message in part.sends:
            mail[rank, message.peer, message.tag] = (message, _values(places[rank], message))
    for rank, part in parts.items():
        for message in part.receives:
            sent, tensors = mail.pop((message.peer, rank, message.tag))
            assert sent.items == message.items
            received += ledger.receive(rank, message)
            _fill(places[rank], message, tensors)
    assert not mail
    for group in sorted({m.group for part in parts.values() for m in part.casts if m.group}):
        lists = [[m for m in parts[rank].casts if m.group == group] for rank in group]
        assert all(messages == lists[0] for messages in lists)
        for message in lists[0]:
            tensors = _values(places[message.peer], message)
            for rank in group:
                if rank != message.peer:
                    received += ledger.receive(rank, message)
                    _fill(places[rank], message, tensors)
    return received


def _values(places: Places, message: Message) -> list[Tensor]:
    return [places.value(name, cell).to(cell.dtype) for name, cell in message.items]


def _fill(places: Places, message: Message, tensors: list[Tensor]) -> None:
    for (name, cell), tensor in zip(message.items, tensors, strict=True):
        for view in places.target(name, cell):
            view.copy_(tensor)
