"""Random layouts (hypothesis strategies), and a sync carried out in memory, message by message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor
from weight_cases import UNTOUCHED, Shapes, box_of, model, numbered, tensors_of

from spmdrl.distributed.mesh import expert_degrees
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalShard, Table, WeightLayout
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.rank_rounds import Message, RankRound, rank_rounds
from spmdrl.weights.views import TensorViews

MODELS = (
    model(num_attention_heads=12, num_key_value_heads=4, head_dim=2, intermediate_size=24,
          vocab_size=36, num_hidden_layers=3),
    model(num_attention_heads=12, num_key_value_heads=12, head_dim=2, vocab_size=60,
          intermediate_size=36, num_hidden_layers=2, tie_word_embeddings=True),
    model(architectures=["Qwen3MoeForCausalLM"], num_attention_heads=12, num_key_value_heads=4,
          head_dim=2, intermediate_size=24, vocab_size=36, num_hidden_layers=3, num_experts=6,
          num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1]),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


EXPERTS, EXPERT_SHAPES = 4, {"up_proj": (6, 5), "down_proj": (5, 6)}
SYNTHETIC = {
    f"synthetic.{layer}.experts.{e}.{kind}.weight": shape
    for layer in (0, 1)
    for kind, shape in EXPERT_SHAPES.items()
    for e in range(EXPERTS)
} | {"padded.weight": (7, 5), "stacked.weight": (EXPERTS, 6, 5), "conv.weight": (6, 1, 3)}
"""Tensors of kinds that `MODELS` lack: experts divided by kind, a vocabulary that is padded to a
multiple of the ranks, and tensors of three dims, whose local tensors have two.
"""


@st.composite
def pairs(draw: st.DrawFn, world_size: int) -> tuple[Shapes, WeightLayout, WeightLayout]:
    """A name space, with a source and a target layout of it somewhere in the world."""
    config = draw(st.sampled_from(MODELS))
    shapes = global_shapes(config)
    if draw(st.booleans()):
        shapes = shapes | SYNTHETIC
    layouts = []
    for is_source in (True, False):
        if draw(st.booleans()):
            layouts.append(draw(boxes(shapes, world_size)))
            continue
        layout = draw(parallel(config, world_size, is_source))
        if shapes.keys() >= SYNTHETIC.keys():
            most = [n for n in (1, 2, 3, 4) if n <= len(layout)]
            ep = draw(st.sampled_from(most))
            tp = draw(st.sampled_from([n for n in most if n * ep <= len(layout)]))
            layout = with_experts(layout, ep, tp)
        layouts.append(layout)
    return shapes, layouts[0], layouts[1]


def with_experts(layout: WeightLayout, ep: int, tp: int) -> WeightLayout:
    """`layout` and `SYNTHETIC`: a rank's experts below each other in one tensor for each kind."""
    result = {}
    for number, (rank, table) in enumerate(layout.items()):
        dtype = next(iter(table.values())).dtype
        at, part = number % ep, number // ep % tp
        experts = range(EXPERTS * at // ep, EXPERTS * (at + 1) // ep)
        own = dict(table)
        for layer in (0, 1):
            for kind, shape in EXPERT_SHAPES.items():
                cut = 0 if kind == "up_proj" else 1
                start, stop = [0, 0], list(shape)
                start[cut], stop[cut] = shape[cut] * part // tp, shape[cut] * (part + 1) // tp
                rows = stop[0] - start[0]
                slices = tuple(
                    Slice(
                        name=f"synthetic.{layer}.experts.{e}.{kind}.weight",
                        shape=shape,
                        start=tuple(start),
                        stop=tuple(stop),
                        offset=place * rows,
                    )
                    for place, e in enumerate(experts)
                )
                held = LocalShard(
                    shape=(len(experts) * rows, stop[1] - start[1]), dtype=dtype, slices=slices
                )
                own[f"layers.{layer}.experts.{kind}"] = held
        chunk = -(-7 // tp)
        low, high = min(7, part * chunk), min(7, (part + 1) * chunk)
        vocabulary = Slice(
            name="padded.weight", shape=(7, 5), start=(low, 0), stop=(high, 5), offset=0
        )
        own["padded"] = LocalShard(shape=(chunk, 5), dtype=dtype, slices=(vocabulary,))
        own["stacked"], own["conv"] = in_three_dims(experts, part, tp, dtype)
        result[rank] = own
    return result


def in_three_dims(
    experts: range, part: int, tp: int, dtype: torch.dtype
) -> tuple[LocalShard, LocalShard]:
    """A rank's rows of its experts in one stacked tensor, and its channels of a convolution."""
    low, high = 6 * part // tp, 6 * (part + 1) // tp
    stacked = tuple(
        Slice(
            name="stacked.weight",
            shape=(EXPERTS, 6, 5),
            start=(e, low, 0),
            stop=(e + 1, high, 5),
            offset=place * (high - low),
        )
        for place, e in enumerate(experts)
    )
    channels = Slice(
        name="conv.weight", shape=(6, 1, 3), start=(low, 0, 0), stop=(high, 1, 3), offset=0
    )
    return (
        LocalShard(shape=(len(experts) * (high - low), 5), dtype=dtype, slices=stacked),
        LocalShard(shape=(high - low, 3), dtype=dtype, slices=(channels,)),
    )


@st.composite
def parallel(draw: st.DrawFn, model: ModelConfig, world_size: int, is_source: bool) -> WeightLayout:
    """What backends (`pp`, `dp`, `cp`, `tp`) and engines (replicas of `tp`) hold; `ep` in these."""
    most = world_size
    degrees = {}
    tps = [1, 2, 3, 4] if is_source else [1, 2, 3, 4, 6, 12]
    kv = model.attention.num_kv_heads
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
    degrees["ep"] = draw(st.sampled_from(fitting_ep(model, degrees, is_source)))
    ranks = sorted(draw(st.permutations(range(world_size)))[:count])
    dtype = draw(st.sampled_from(DTYPES))
    shards = degrees.get("dp_shard", 1) * degrees.get("cp", 1)
    sizes = (kv, model.attention.num_heads, model.dense_width)
    fits = degrees.get("dp_shard", 1) > 1 and not any(n % (shards * degrees["tp"]) for n in sizes)
    blocks = draw(st.sampled_from([1, shards])) if fits else 1
    return model_layout(model, ranks, degrees, dtype, blocks=blocks)


def fitting_ep(model: ModelConfig, degrees: Mapping[str, int], is_source: bool) -> list[int]:
    """The parts into which the experts can be divided; of an engine those within tp."""
    if model.moe is None:
        return [1]
    fitting = []
    for ep in (1, 2, 3, 6):
        experts = expert_degrees({**degrees, "ep": ep})
        room = degrees.get("dp_shard", 1) * degrees.get("cp", 1)
        if degrees.get("dp_shard", 1) == 1:
            room *= degrees["dp_replicate"]
        divides = model.moe.num_experts % ep == model.moe.width % experts["etp"] == 0
        if divides and room % experts["exchange"] == 0 and (is_source or degrees["tp"] % ep == 0):
            fitting.append(ep)
    return fitting


@st.composite
def boxes(draw: st.DrawFn, shapes: Shapes, world_size: int) -> WeightLayout:
    """Every tensor cut anywhere, each box on any ranks: whatever a backend may bring."""
    pieces: dict[int, list[Slice]] = {}
    dtype = draw(st.sampled_from(DTYPES))
    for name, shape in shapes.items():
        cuts = [
            sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape
        ]
        for at in product(*(range(len(bounds) - 1) for bounds in cuts)):
            start = tuple(bounds[i] for bounds, i in zip(cuts, at, strict=True))
            stop = tuple(bounds[i + 1] for bounds, i in zip(cuts, at, strict=True))
            piece = Slice(name=name, shape=shape, start=start, stop=stop, offset=0)
            for rank in draw(st.sets(st.integers(0, world_size - 1), min_size=1, max_size=4)):
                pieces.setdefault(rank, []).append(piece)
    chance = Random(draw(st.integers(0, 2**32)))
    return {rank: _stacked(own, dtype, chance) for rank, own in pieces.items()}


def _stacked(pieces: list[Slice], dtype: torch.dtype, chance: Random) -> Table:
    """Boxes of equal width below each other in tensors of up to three, padding between them."""
    by_width: dict[tuple[int, ...], list[Slice]] = {}
    for piece in chance.sample(pieces, len(pieces)):
        # local tensors have two dims at most
        by_width.setdefault(piece.size[1:][-1:], []).append(piece)
    table = {}
    for width, own in by_width.items():
        while own:
            taken = [own.pop() for _ in range(min(len(own), chance.randint(1, 3)))]
            rows, slices = 0, []
            for piece in taken:
                rows += chance.choice((0, 0, 2))
                slices.append(replace(piece, offset=rows))
                rows += piece.rows
            shape = (rows + chance.choice((0, 1)), *width)
            table[f"{taken[0].name}{taken[0].start}"] = LocalShard(
                shape=shape, dtype=dtype, slices=tuple(slices)
            )
    return table


class Ledger:
    """What every rank holds or has received of every tensor."""

    def __init__(self, shapes: Shapes, source: WeightLayout) -> None:
        self._there: dict[tuple[int, str], Tensor] = {}
        self._shapes = shapes
        for rank, table in source.items():
            for held in table.values():
                for piece in held.slices:
                    self._box(rank, piece.name, piece.start, piece.stop).fill_(True)

    def _box(self, rank: int, name: str, start: tuple[int, ...], stop: tuple[int, ...]) -> Tensor:
        new = torch.zeros(self._shapes[name], dtype=torch.bool)
        mask = self._there.setdefault((rank, name), new)
        return mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]

    def lacking(self, target: WeightLayout) -> int:
        """Bytes that target ranks want and do not have, value by value, in the target's dtype."""
        total = 0
        for rank, table in target.items():
            wanted: dict[str, Tensor] = {}
            for held in table.values():
                for piece in held.slices:
                    new = torch.zeros(piece.shape, dtype=torch.int64)
                    box = wanted.setdefault(piece.name, new)[box_of(piece)]
                    box.clamp_(min=held.dtype.itemsize)
            for name, sizes in wanted.items():
                have = self._there.get((rank, name))
                total += int(sizes.sum() if have is None else sizes[~have].sum())
        return total

    def receive(self, rank: int, message: Message) -> int:
        """Note what came; it must be new to the rank. Returns its bytes."""
        for name, cell in message.cells:
            box = self._box(rank, name, cell.start, cell.stop)
            assert not box.any(), f"rank {rank} got {name} {cell} that it had"
            box.fill_(True)
        return message.num_bytes


def simulate(
    shapes: Shapes, plan: SyncPlan, source: WeightLayout, target: WeightLayout
) -> tuple[int, int]:
    """Carry out a plan for all ranks and check the targets.

    Returns:
        The bytes received, and the bytes that the targets lacked, counted apart from the plan.
    """
    whole = numbered(shapes)
    ranks = range(plan.world_size)
    nothing: Table = {}
    tensors = {r: tensors_of(source.get(r, nothing), whole, math.nan) for r in ranks}
    filled = {
        r: {
            name: torch.full(held.shape, UNTOUCHED, dtype=held.dtype)
            for name, held in target.get(r, nothing).items()
            if name not in plan.shared.get(r, ())
        }
        for r in ranks
    }
    places = {
        r: TensorViews(
            {n: (tensors[r][n], held.slices) for n, held in source.get(r, nothing).items()},
            {n: (t, target[r][n].slices) for n, t in filled[r].items()},
            lambda tensor: tensor,
        )
        for r in ranks
    }
    rounds = (*plan.frozen_rounds, *plan.rounds)
    programs = {r: rank_rounds(plan, rounds, r) for r in ranks}
    ledger, received = Ledger(shapes, source), 0
    lacking = ledger.lacking(target)
    for number in range(len(rounds)):
        parts = {r: programs[r][number] for r in ranks}
        received += _carry_out(parts, places, ledger)
        for part in parts.values():
            staged = [*part.sends, *part.receives, *part.casts]
            is_single = len({item for m in staged for item in m.cells}) <= 1
            assert is_single or sum(m.num_bytes for m in staged) <= plan.slot_bytes
    # what was narrower at the source cannot have more digits here
    source_dtype = next(held.dtype for table in source.values() for held in table.values())
    for rank, table in target.items():
        for name, expected in tensors_of(table, whole, UNTOUCHED).items():
            if name in plan.shared[rank]:
                expected = tensors_of({name: source[rank][name]}, whole, math.nan)[name]
                assert torch.equal(tensors[rank][name].nan_to_num(), expected.nan_to_num())
                continue
            narrow = source_dtype if source_dtype.itemsize < expected.itemsize else expected.dtype
            assert torch.equal(filled[rank][name], expected.to(narrow).to(expected.dtype)), name
    return received, lacking


def _carry_out(
    parts: Mapping[int, RankRound], places: Mapping[int, TensorViews], ledger: Ledger
) -> int:
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
            assert sent.cells == message.cells
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


def _values(places: TensorViews, message: Message) -> list[Tensor]:
    return [places.value(name, cell).to(cell.dtype) for name, cell in message.cells]


def _fill(places: TensorViews, message: Message, tensors: list[Tensor]) -> None:
    for (name, cell), tensor in zip(message.cells, tensors, strict=True):
        for view in places.target(name, cell):
            view.copy_(tensor)
