"""Stage `training`: a microbatch forward and backward, log-probabilities, an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from first_minutes.cards import card_of, scaled, total
from first_minutes.cases import Case, Outcome, Setting
from first_minutes.clock import profiled, wall_s
from first_minutes.operations import Operation, OperationCount, slower_s
from first_minutes.shapes import (
    DeviceWeights,
    attention_flops,
    body_and_head,
    model_of,
    parameters,
)
from spmdrl.algorithms.policy_loss import clipped_policy_loss
from spmdrl.batch import Batch, from_rows
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.config.roles import RoleSection
from spmdrl.distributed.mesh import AXES, Mesh
from spmdrl.models.config import ModelConfig
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LossInput
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import start_world

_STATES = 2 + 4 + 8 + 4
"""Bytes per parameter: bfloat16 weight, float32 master, two moments, and summed gradient."""

_MOST_MEMORY = 0.95
"""Share of a device that torch can hand out at most."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A microbatch: rows in groups with a common prompt."""

    rows: int
    prompt: int
    response: int
    group: int = 8

    @property
    def tokens(self) -> int:
        """Tokens of the packed stream, in which a group's prompt lies once."""
        groups = -(-self.rows // self.group)
        return groups * self.prompt + self.rows * self.response

    def sequences(self) -> list[tuple[int, int]]:
        """Return (queries, keys) of every sequence of attention."""
        groups = -(-self.rows // self.group)
        responses = [(self.response, self.prompt + self.response)] * self.rows
        return [(self.prompt, self.prompt)] * groups + responses


def cases(setting: Setting) -> Iterator[Case]:
    start_world(device="cuda")
    sizes: tuple[Shape, ...] = (
        Shape(rows=8, prompt=512, response=896),
        Shape(rows=16, prompt=512, response=896),
    )
    if setting.small:
        sizes = (Shape(rows=4, prompt=16, response=24, group=4),)
    for shape in sizes:
        yield Case(name=f"1.5B, {shape.tokens} tokens", run=partial(training, setting, shape))
    yield Case(name="1.5B, kernels", run=partial(kernels, setting, sizes[0]))


def make_backend(setting: Setting, model: ModelConfig, shape: Shape) -> TorchBackend:
    options = TrainOptions(
        microbatch_tokens=2 * shape.tokens, param_dtype=torch.bfloat16, total_steps=100
    )
    mesh = Mesh("policy", [0], {}, "cuda")
    weights = DeviceWeights(model, setting.device)
    return TorchBackend(mesh, model, weights, options, setting.device)


def make_batch(model: ModelConfig, shape: Shape) -> Batch:
    """Make rows of random tokens with the columns that the loss reads."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(5, model.vocab_size, (count,), generator=generator).tolist()

    prompts = [draw(shape.prompt) for _ in range(-(-shape.rows // shape.group))]
    rows = [prompts[i // shape.group] + draw(shape.response) for i in range(shape.rows)]
    length = shape.prompt + shape.response
    count = shape.rows * length
    mask = torch.arange(count) % length >= shape.prompt
    batch = from_rows(
        rows,
        rows={
            "prompt_ids": torch.arange(shape.rows) // shape.group,
            "prompt_lengths": torch.full((shape.rows,), shape.prompt),
        },
    )
    return batch.with_columns(
        tokens={
            "loss_mask": mask,
            "advantages": torch.randn(count, generator=generator),
            "weights": mask.float(),
        }
    )


def policy_loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    columns = given.columns
    return clipped_policy_loss(
        given["logprobs"], given["entropy"], columns, columns["weights"], AlgorithmSection()
    )


def counted(function: Callable[[], object]) -> Sequence[Operation]:
    """Run the function once and return what it issued."""
    with OperationCount() as count:
        function()
    return count.operations


def training(setting: Setting, shape: Shape) -> Outcome:
    """Time the three calls of an update, and measure its peak memory.

    Predictions add the operations that each call issues, at the machine's ceilings, and attention's
    products (a backward pass has five where a forward pass has two). The utilisation counts six
    operations per parameter and token, head only at the responses, of the published rate.
    """
    model = model_of("1.5B", small=setting.small)
    expected = peak_bytes(model, shape, setting.device)
    capacity = torch.cuda.get_device_properties(setting.device).total_memory
    if expected > _MOST_MEMORY * capacity:
        return Outcome(skipped=f"{expected / 1e9:.0f} GB are expected, of {capacity / 1e9:.0f}")
    backend, batch = make_backend(setting, model, shape), make_batch(model, shape)
    readout = next_token()
    normaliser = float(shape.rows * shape.response)
    torch.cuda.reset_peak_memory_stats()

    def update() -> None:
        backend.forward_backward(batch, policy_loss, readout, normaliser=normaliser)

    def score() -> None:
        backend.forward(batch, readout)

    issued = {"forward_backward": counted(update), "optimizer": counted(backend.optim_step)}
    issued["logprobs"] = counted(score)
    seconds = {"forward_backward": wall_s(update, repeats=3)}
    seconds["optimizer"] = wall_s(backend.optim_step)
    seconds["logprobs"] = wall_s(score, repeats=3)
    attended = attention_flops(model, shape.sequences())
    ceilings = setting.ceilings
    predicted = {
        "forward_backward": total(
            slower_s(issued["forward_backward"], ceilings), ceilings.product_s(3.5 * attended)
        ),
        "optimizer": slower_s(issued["optimizer"], ceilings),
        "logprobs": total(slower_s(issued["logprobs"], ceilings), ceilings.product_s(attended)),
    }
    peak = torch.cuda.max_memory_allocated()
    return Outcome(
        predicted={
            **{f"{name}_ms": scaled(value, 1e3) for name, value in predicted.items()},
            "peak_gb": expected / 1e9,
        },
        measured={
            **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
            "peak_gb": peak / 1e9,
            **utilisation(setting, model, shape, seconds["forward_backward"]),
        },
        facts={f"operations_{name}": len(found) for name, found in issued.items()},
    )


def utilisation(
    setting: Setting, model: ModelConfig, shape: Shape, seconds: float
) -> dict[str, float]:
    body, head = body_and_head(model)
    flops = 6 * (body * shape.tokens + head * shape.rows * shape.response)
    card = card_of(torch.cuda.get_device_name(setting.device))
    rates = {"tflops": flops / seconds / 1e12}
    if card is not None:
        rates["mfu"] = rates["tflops"] / card.bf16_tflops
    return rates


def peak_bytes(model: ModelConfig, shape: Shape, device: torch.device) -> int:
    """Predict the peak as the run's own memory plan does: states and working memory."""
    spec = RoleSpec(
        name="policy",
        kind="policy",
        section=RoleSection(),
        train=TrainOptions(),
        placement=Placement(ranks=(0,), degrees=dict.fromkeys((*AXES, "ep"), 1)),
        path=Path(),
        model=model,
        device_type="cuda" if device.type == "cuda" else "cpu",
        dtype=torch.bfloat16,
        trained=True,
        backend="torch",
        is_tiny=False,
    )
    states = _STATES * sum(parameters(model).values())
    return states + working_bytes(spec, shape.tokens, backward=True)


def kernels(setting: Setting, shape: Shape) -> Outcome:
    """List the kernels that take most of a microbatch's time, by torch's profiler."""
    model = model_of("1.5B", small=setting.small)
    backend, batch = make_backend(setting, model, shape), make_batch(model, shape)

    def update() -> None:
        backend.forward_backward(batch, policy_loss, next_token(), normaliser=1.0)

    update()
    return Outcome(facts={"top": profiled(update)})
