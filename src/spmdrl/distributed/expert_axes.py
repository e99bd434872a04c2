"""Expert parallelism folded into a role's other axes: pure functions of degrees.

`ep` adds no ranks. For the experts, the ranks of a pipeline stage (dp_replicate x dp_shard x cp x
tp, tp fastest) are viewed as edp x ep x etp, etp fastest, as Megatron-Core folds them (MoE Parallel
Folding, https://arxiv.org/abs/2504.14960): `etp` ranks divide each expert, `ep` parts hold
different experts, and `edp` ranks hold the same ones and sum their gradients. etp is the rest of tp
that ep leaves, tp / gcd(tp, ep): the parts are placed on the ranks of tp first, since these have
the same tokens and exchange none, and then on those of cp and dp. So ep is exchange x ep_tp: ranks
with the same tp coordinate send tokens to each other along `exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

EXPERT_AXES = ("pp", "edp", "exchange", "ep_tp", "etp")
"""Expert axes, outermost first; their degrees multiply to the number of the role's ranks."""


def expert_degrees(degrees: Mapping[str, int]) -> dict[str, int]:
    """The degree of every expert axis; `degrees` are those of `mesh.AXES` and `ep`."""
    tp, ep = degrees.get("tp", 1), degrees.get("ep", 1)
    ep_tp = math.gcd(tp, ep)
    exchange = ep // ep_tp
    return {
        "pp": degrees.get("pp", 1),
        "edp": _data(degrees) // exchange,
        "exchange": exchange,
        "ep_tp": ep_tp,
        "etp": tp // ep_tp,
    }


def expert_place(degrees: Mapping[str, int], place: Mapping[str, int]) -> dict[str, int]:
    """A rank's index along every expert axis, and along `ep`: the part of the experts it holds.

    Args:
        place: the rank's index along every axis of `mesh.AXES`.
    """
    sizes = expert_degrees(degrees)
    data = place["dp_replicate"] * degrees.get("dp_shard", 1) + place["dp_shard"]
    data = data * degrees.get("cp", 1) + place["cp"]
    edp, exchange = divmod(data, sizes["exchange"])
    ep_tp, etp = divmod(place["tp"], sizes["etp"])
    ep = exchange * sizes["ep_tp"] + ep_tp
    return {
        "pp": place["pp"],
        "edp": edp,
        "exchange": exchange,
        "ep_tp": ep_tp,
        "etp": etp,
        "ep": ep,
    }


def check_ep(role: str, degrees: Mapping[str, int]) -> None:
    """Refuse an `ep` that the role's ranks cannot be divided into.

    If weights are sharded (dp_shard), tokens are exchanged within the ranks of one copy of them.

    Raises:
        ValueError: ep does not divide those ranks; the degrees are named.
    """
    tp, ep, cp = (degrees.get(axis, 1) for axis in ("tp", "ep", "cp"))
    shard = degrees.get("dp_shard", 1)
    exchange = ep // math.gcd(tp, ep)
    room, axes = (shard * cp, "dp_shard x cp") if shard > 1 else (_data(degrees), "dp x cp")
    if room % exchange:
        raise ValueError(
            f"roles.{role}.ep={ep} with tp={tp} leaves {exchange} parts of the experts to the "
            f"ranks of {axes}, which are {room}: choose an ep that divides {room * tp}, or other "
            "degrees"
        )


def _data(degrees: Mapping[str, int]) -> int:
    """Number of ranks along the data-parallel axes and cp."""
    return math.prod(degrees.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "cp"))
