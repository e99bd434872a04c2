"""Prints the predictions of docs/kernels.md: times of a decode step and of a microbatch, by the
bytes and operations that the kernels take and the rates of `planning/forecast/gpus.yaml`.

    PYTHONPATH=src python scripts/dev/kernel_predictions.py

Nothing here is measured on a card but the shares of a card's rates that are assumed, below.
"""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import MoeMlp, SoftmaxAttention
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.planning.known_models import known_model

CARDS = ("h100", "h200", "b200")
MODELS = {"1.5B": "qwen2.5-1.5b", "8B": "llama-3.1-8b", "30B-A3B": "qwen3-30b-a3b"}
ROWS, CONTEXT, TOKENS, KEYS = (64, 256), 1024, 7672, 704
"""Sequences of a decode step and keys that each sees; tokens of a microbatch and keys of each."""

SAMPLES, PROMPT = 8, 512
"""Samples of a prompt, and its tokens, which they read together."""

COPY_SHARE = 0.895
"""Share of the memory's rate that a copy reaches: 3.0 of 3.35 TB/s on an H100."""
PRODUCT_SHARE, ATTENTION_SHARE = 0.66, 0.45
"""Shares of the peak in large products and in attention, forward and backward together."""
NODE_S = 1.5e-6
"""What a node of a graph takes in addition to its bytes."""
NODES, MOE_NODES = 9, 26
"""Nodes of a dense layer, counted on the stand-in device, and of one with experts, assumed."""
OTHER_NODES = 14
"""Nodes of a step that are no layer's, counted on the stand-in device."""
PLACES = 11264
"""Keys of a microbatch as laid out for attention: a shared prompt once for each response."""
HEAD_CHUNK = 1024
"""Tokens whose logits are held at once."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model with equal layers.

    Args:
        heads, kv_heads, dims, width: those of a layer; the width is that of all MLPs of a token.
        norms: whether queries and keys are normed head by head.
        layers, hidden, vocabulary: those of the model.
        fixed: parameters that every token's products use, the head's included.
        experts, chosen, expert: number of experts, of those of a token, and the parameters of one
            in all layers.
    """

    heads: int
    kv_heads: int
    dims: int
    width: int
    norms: bool = False
    layers: int
    hidden: int
    vocabulary: int
    fixed: float
    experts: int
    chosen: int
    expert: float

    @property
    def active(self) -> float:
        """Parameters in a token's products."""
        return self.fixed + self.chosen * self.expert

    def read(self, rows: int) -> float:
        """Parameters that a step of so many rows reads, experts as if drawn at random."""
        if not self.experts:
            return self.fixed
        missed = (1 - self.chosen / self.experts) ** rows
        return self.fixed + self.experts * (1 - missed) * self.expert


def sizes_of(model: ModelConfig) -> Sizes:
    layer = model.layers[0]
    mixer, mlp = layer.mixer, layer.mlp
    assert isinstance(mixer, SoftmaxAttention)
    moe = isinstance(mlp, MoeMlp)
    attention = (2 * mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim * model.hidden_size
    own = 3 * mlp.width * model.hidden_size
    per_layer = attention + (mlp.num_experts * model.hidden_size if moe else own)
    head = model.vocab_size * model.hidden_size
    return Sizes(
        heads=mixer.num_heads,
        kv_heads=mixer.num_kv_heads,
        dims=mixer.head_dim,
        width=mlp.width * (mlp.top_k if moe else 1),
        norms=mixer.qk_norm != "none",
        layers=model.num_layers,
        hidden=model.hidden_size,
        vocabulary=model.vocab_size,
        fixed=model.num_layers * per_layer + head,
        experts=mlp.num_experts if moe else 0,
        chosen=mlp.top_k if moe else 0,
        expert=model.num_layers * own if moe else 0,
    )


def decode_bytes(s: Sizes, n: int, rows: int = 1) -> tuple[float, float, float]:
    """Bytes of weights, of keys and values, and of everything else of a step.

    Args:
        rows: so many samples of a prompt read it together.
    """
    splits = -(-CONTEXT // 256)
    read = CONTEXT - PROMPT + PROMPT * -(-SAMPLES // rows) / SAMPLES
    keys = 4.0 * n * read * s.kv_heads * s.dims * s.layers
    turned = 4 * n * (s.heads + 2 * s.kv_heads) * s.dims
    attention = 8 * n * s.heads * splits * (s.dims + 1) + 4 * n * s.heads * s.dims
    others = s.layers * (turned + attention + 16 * n * s.hidden + 6 * n * s.width)
    return 2 * s.read(n), keys, others + 8.0 * n * s.vocabulary


def microbatch_bytes(s: Sizes) -> tuple[float, float]:
    """Bytes that elementwise passes of the layers and of the head take, forward and backward."""
    t, d = TOKENS, s.hidden
    stream = 2 * (8 + 8) * t * d  # norms with additions, forward and backward
    heads = t * (s.heads + s.kv_heads) * s.dims
    turned = 8 * heads + 8 * PLACES * s.kv_heads * s.dims + 16 * t * s.dims
    if s.norms:  # by torch's operations, with the concatenations that they need
        turned += 22 * heads
    head = 18.0 * t * s.vocabulary + 8.0 * s.vocabulary * d * t / HEAD_CHUNK
    return s.layers * (stream + turned + 16.0 * t * s.width), head


def decode_line(name: str, s: Sizes, n: int) -> str:
    weights, keys, others = decode_bytes(s, n)
    nodes = (MOE_NODES if s.experts else NODES) * s.layers + OTHER_NODES
    cells = [f"{name}, n {n}", f"{weights / 1e9:.2f}", f"{keys / 1e9:.2f}", f"{others / 1e9:.2f}"]
    for card in CARDS:
        rate = load_machine(card, num_nodes=1, devices_per_node=1).device.memory_rate * COPY_SHARE
        floor, time = (weights + keys) / rate, (weights + keys + others) / rate + nodes * NODE_S
        cells.append(f"{time * 1e3:.1f} ms, {floor / time:.0%}")
    return "| " + " | ".join([*cells[:4], str(nodes), *cells[4:]]) + " |"


def cascade_line(name: str, s: Sizes, n: int) -> str:
    rows = rows_together(s)
    weights, keys, others = decode_bytes(s, n, rows)
    least = decode_bytes(s, n, SAMPLES)[1]
    nodes = (MOE_NODES if s.experts else NODES) * s.layers + OTHER_NODES
    alone = decode_bytes(s, n)[1]
    cells = [f"{name}, n {n}", str(rows), f"{alone / 1e9:.2f}", f"{keys / 1e9:.2f}"]
    for card in CARDS:
        rate = load_machine(card, num_nodes=1, devices_per_node=1).device.memory_rate * COPY_SHARE
        floor, time = (weights + least) / rate, (weights + keys + others) / rate + nodes * NODE_S
        cells.append(f"{time * 1e3:.1f} ms, {floor / time:.0%}")
    return "| " + " | ".join(cells) + " |"


def rows_together(s: Sizes) -> int:
    """Return the most rows that a program reads a prompt's keys for."""
    from spmdrl.models.kernels.cuda.cascade import rows_of_program  # which needs Triton

    return rows_of_program(s.heads // s.kv_heads, s.dims)


def train_line(name: str, s: Sizes) -> str:
    products = 6 * s.active * TOKENS + 2 * s.vocabulary * s.hidden * TOKENS  # the head's twice
    attention = 14.0 * TOKENS * KEYS * s.heads * s.dims * s.layers
    layers, head = microbatch_bytes(s)
    useful = 6 * s.active * TOKENS + 12.0 * TOKENS * KEYS * s.heads * s.dims * s.layers
    cells = [name, f"{products / 1e12:.0f}", f"{attention / 1e12:.1f}"]
    cells += [f"{layers / 1e9:.0f} + {head / 1e9:.0f}"]
    for card in CARDS:
        device = load_machine(card, num_nodes=1, devices_per_node=1).device
        peak, rate = device.flops["bfloat16"], device.memory_rate * COPY_SHARE
        time = products / (peak * PRODUCT_SHARE) + attention / (peak * ATTENTION_SHARE)
        time += (layers + head) / rate
        cells.append(f"{time * 1e3:.0f} ms, {useful / time / peak:.0%}")
    return "| " + " | ".join(cells) + " |"


def tables() -> list[str]:
    """Lines of the three tables, in Markdown."""
    names = [card.upper() for card in CARDS]
    lines = [
        "| model | weights, GB | keys and values, GB | other, GB | nodes | "
        + " | ".join(names)
        + " |",
        "|" + "---|" * (5 + len(CARDS)),
    ]
    sizes = {name: sizes_of(known_model(model)) for name, model in MODELS.items()}
    lines += [decode_line(name, s, n) for name, s in sizes.items() for n in ROWS]
    lines += [
        "",
        "| model | rows that read together | keys and values alone, GB | together, GB | "
        + " | ".join(names)
        + " |",
        "|" + "---|" * (4 + len(CARDS)),
    ]
    lines += [cascade_line(name, s, n) for name, s in sizes.items() for n in ROWS]
    lines += [
        "",
        "| model | products, TFLOP | attention, TFLOP | layers + head, GB | "
        + " | ".join(names)
        + " |",
        "|" + "---|" * (4 + len(CARDS)),
    ]
    return lines + [train_line(name, s) for name, s in sizes.items()]


if __name__ == "__main__":
    print("\n".join(tables()))
