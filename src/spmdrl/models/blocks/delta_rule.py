"""The gated delta rule and its short convolution, as functions of tensors in plain torch.

A head's state S [d, v_dim] maps keys to values. Token t, with decay a_t and rate b_t, corrects what
its key finds there, and its query reads the result (Yang, Kautz & Hatamizadeh 2024,
https://arxiv.org/abs/2412.06464, section 3.1):

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T        o_t = S_t^T q_t

Keys and queries have unit length, and queries are scaled by d ** -0.5. `delta_step` computes one
token. `chunk_products` and `scan_chunks` compute chunks of tokens by matrix products (section 3.3):
the corrections of a chunk solve a triangular system, so only states at its start are passed on.
All of it computes in float32, or in float64 for such inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6
"""Added to the squared lengths of keys and queries, as in the published models' code."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeltaInputs:
    """One layer's inputs to the recurrence over a stream of T tokens, on one tensor-parallel rank.

    Args:
        mixed: [T, C] with C = 2 H d + HV v_dim: queries, keys, values before the convolution.
        conv_weight: [C, K]; the last column is the token's own.
        decay: [T, HV], the logarithm of a_t, at most 0.
        beta: [T, HV], b_t.
        num_heads: H, heads of queries and keys; each serves HV / H neighbouring heads of values.
        head_dim: d.
        activate: the function of the convolution's results.
    """

    mixed: Tensor
    conv_weight: Tensor
    decay: Tensor
    beta: Tensor
    num_heads: int
    head_dim: int
    activate: Callable[[Tensor], Tensor] = F.silu

    @property
    def num_v_heads(self) -> int:
        return self.decay.shape[1]

    @property
    def v_dim(self) -> int:
        return (self.mixed.shape[1] - 2 * self.num_heads * self.head_dim) // self.num_v_heads

    def convolve(self, laid: Tensor) -> Tensor:  # [L, C] -> [L - K + 1, C]
        """Compute the activated convolution of rows that follow one another."""
        return self.activate(causal_convolution(laid, self.conv_weight))

    def convolve_last(self, windows: Tensor) -> Tensor:  # [N, K, C] -> [N, C]
        """Compute the activated convolution at the last of each window's rows."""
        wide = _wide(windows)
        return self.activate((windows.to(wide) * self.conv_weight.mT.to(wide)).sum(1))

    def rows(self, rows: slice) -> DeltaInputs:
        """Return the inputs of some tokens."""
        return replace(self, mixed=self.mixed[rows], decay=self.decay[rows], beta=self.beta[rows])

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split convolved rows [..., C] into q and k [..., H, d] and v [..., HV, v_dim]."""
        width = self.num_heads * self.head_dim
        q, k, v = torch.split(mixed, [width, width, self.num_v_heads * self.v_dim], dim=-1)
        outer = mixed.shape[:-1]
        return (
            q.reshape(*outer, self.num_heads, self.head_dim),
            k.reshape(*outer, self.num_heads, self.head_dim),
            v.reshape(*outer, self.num_v_heads, self.v_dim),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkProducts:
    """The parts of n chunks of c tokens that need no state; R = HV / H.

    Args:
        values, reads: [n, H, R, c, v_dim] and [n, H, R, c, d]: the chunk's corrections are
            values - reads S, with S the state at its start.
        queries, scores: [n, H, R, c, d] and [n, H, R, c, c]: the outputs are
            queries S + scores corrections.
        keys, kept: [n, H, R, c, d] and [n, H, R, 1, 1]: the next state is
            kept S + keys^T corrections.
    """

    values: Tensor
    reads: Tensor
    queries: Tensor
    scores: Tensor
    keys: Tensor
    kept: Tensor


def causal_convolution(
    rows: Tensor,  # [L, C]
    weight: Tensor,  # [C, K]
) -> Tensor:  # [L - K + 1, C], float32 or wider
    """Sum each row and the K - 1 before it, weighted channel by channel."""
    rows, weight = rows.to(_wide(rows)), weight.to(_wide(rows))
    size = weight.shape[1]
    length = len(rows) - size + 1
    out = rows[:length] * weight[:, 0]
    for k in range(1, size):
        out = torch.addcmul(out, rows[k : k + length], weight[:, k])
    return out


def unit(x: Tensor) -> Tensor:  # [..., d] -> [..., d], float32 or wider
    """Scale vectors to length one."""
    x = x.to(_wide(x))
    scale = torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)
    return x * scale


def chunk_products(
    q: Tensor,  # [n, c, H, d]
    k: Tensor,  # [n, c, H, d]
    v: Tensor,  # [n, c, HV, v_dim]
    decay: Tensor,  # [n, c, HV], logarithms; 0 where a chunk has no token
    beta: Tensor,  # [n, c, HV]; 0 where a chunk has no token
) -> ChunkProducts:
    """Compute what does not depend on states, for all chunks at once."""
    num_heads, size = q.shape[2], q.shape[1]
    q = (unit(q) * q.shape[-1] ** -0.5).transpose(1, 2).unsqueeze(2)  # [n, H, 1, c, d]
    k = unit(k).transpose(1, 2).unsqueeze(2)
    wide = q.dtype

    def by_head(x: Tensor) -> Tensor:  # [n, c, HV, ...] -> [n, H, R, c, ...]
        x = x.to(wide).transpose(1, 2)
        return x.reshape(len(x), num_heads, -1, *x.shape[2:])

    v, decay, beta = by_head(v), by_head(decay), by_head(beta)
    beta = beta.unsqueeze(-1)  # [n, H, R, c, 1]
    # sums of logarithms may be large, and what counts is their small differences
    total = decay.double().cumsum(-1)  # [n, H, R, c]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(wide)
    between = between.masked_fill(future, -torch.inf).exp()
    total = total.unsqueeze(-1)
    since_start, to_end = total.to(wide).exp(), (total[..., -1:, :] - total).to(wide).exp()
    system = k @ k.mT * between * beta  # its diagonal is taken as ones
    sides = torch.cat((v * beta, k * (beta * since_start)), dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    values, reads = torch.split(solved, [v.shape[-1], k.shape[-1]], dim=-1)
    return ChunkProducts(
        values=values,
        reads=reads,
        queries=q * since_start,
        scores=q @ k.mT * between,
        keys=k * to_end,
        kept=since_start[..., -1:, :],
    )


def scan_chunks(
    products: ChunkProducts,
    initial: Tensor | None,  # [sizes[0], HV, d, v_dim]; None: zeros
    sizes: Sequence[int],
    previous: Sequence[Tensor | None],
    *,
    keeps: bool,
) -> tuple[Tensor, list[Tensor]]:  # [n, H, R, c, v_dim]; per step [size, H, R, d, v_dim]
    """Pass states from chunk to chunk; return all outputs, and the states at the chunks' ends if
    `keeps`.

    Args:
        sizes: number of chunks of each step, in the order of the products. Each chunk of a step
            takes its state from a chunk of the step before.
        previous: for each step but the first, the places in the step before of the chunks' states;
            None: the same places.
    """
    names = ("values", "reads", "queries", "scores", "keys", "kept")
    parts = [torch.split(vars(products)[name], list(sizes)) for name in names]
    num_heads = products.values.shape[1]
    state: Tensor | None = None
    if initial is not None:
        state = initial.to(products.values.dtype)
        state = state.view(len(state), num_heads, -1, *state.shape[2:])
    outputs, states = [], []
    for step, (values, reads, queries, scores, keys, kept) in enumerate(zip(*parts, strict=True)):
        places = previous[step - 1] if step else None
        if places is not None and state is not None:
            state = state.index_select(0, places)
        corrections = values if state is None else values - reads @ state
        own = scores @ corrections
        outputs.append(own if state is None else own + queries @ state)
        if step + 1 == len(sizes) and not keeps:
            break  # no chunk continues the last ones
        added = keys.mT @ corrections
        state = added if state is None else state * kept + added
        if keeps:
            states.append(state)
    return torch.cat(outputs), states


def delta_step(
    state: Tensor,  # [N, HV, d, v_dim], float32 or wider; overwritten
    q: Tensor,  # [N, H, d]
    k: Tensor,  # [N, H, d]
    v: Tensor,  # [N, HV, v_dim]
    decay: Tensor,  # [N, HV], logarithms
    beta: Tensor,  # [N, HV]
) -> Tensor:  # [N, HV, v_dim]
    """Advance states by one token each, in place and without gradient; return the outputs."""
    repeats = state.shape[1] // q.shape[1]
    q, k = (unit(x).repeat_interleave(repeats, dim=1).to(state.dtype) for x in (q, k))
    state *= decay.to(state.dtype).exp()[..., None, None]
    found = (k.unsqueeze(-2) @ state).squeeze(-2)
    corrections = (v.to(state.dtype) - found) * beta.to(state.dtype).unsqueeze(-1)
    state.addcmul_(k.unsqueeze(-1), corrections.unsqueeze(-2))
    scaled: Tensor = q * q.shape[-1] ** -0.5
    return (scaled.unsqueeze(-2) @ state).squeeze(-2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
