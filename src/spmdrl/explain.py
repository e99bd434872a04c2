"""`spmdrl explain`: the resolved configuration, and how each derived quantity comes about."""

from __future__ import annotations

import torch
import yaml

from spmdrl.config import Config
from spmdrl.distributed.mesh import format_ranks
from spmdrl.models.config import ModelConfig, read_config, tiny
from spmdrl.placement import Placement, place_roles
from spmdrl.role_plan import check_model, plan_roles, training_dtype


def explain(config: Config, world_size: int, ranks_per_node: int | None = None) -> str:
    """The text that `spmdrl explain CONFIG --ranks N` prints.

    Args:
        ranks_per_node: default: one node has all ranks.

    Raises:
        ValueError: roles that do not fit the world, or a model that cannot be read.
    """
    placements = place_roles(config, world_size, ranks_per_node)
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    lines = ["# resolved configuration", resolved, f"# derived, on {world_size} ranks"]
    lines += [f"{name:<28} {value:>14}   {how}" for name, value, how in _derived(config)]
    lines += ["", "# roles"]
    for name, placement in placements.items():
        lines.append(_role_line(config, name, placement))
    lines += ["", "# weights", *_weights(config, placements)]
    return "\n".join(lines)


def _derived(config: Config) -> list[tuple[str, str, str]]:
    data, train, sampling = config.data, config.train, config.sampling
    samples = data.prompts_per_step * data.group_size
    tokens = samples * (data.train.max_tokens + sampling.max_tokens)
    groups = data.prompts_per_step / train.num_minibatches
    updates = train.epochs * train.num_minibatches
    packed = (
        data.prompts_per_step * data.train.max_tokens + samples * sampling.max_tokens
        if train.share_prompts
        else tokens
    )
    return [
        (
            "samples per step",
            f"{samples:,}",
            f"data.prompts_per_step={data.prompts_per_step} x data.group_size={data.group_size}",
        ),
        (
            "optimizer steps per step",
            f"{updates:,}",
            f"train.epochs={train.epochs} x train.num_minibatches={train.num_minibatches}",
        ),
        (
            "groups per minibatch",
            f"{groups:g}",
            f"data.prompts_per_step / train.num_minibatches={train.num_minibatches}; "
            "sizes differ by at most one group",
        ),
        (
            "optimizer steps in all",
            f"{config.steps * updates:,}",
            f"steps={config.steps} x {updates} per step",
        ),
        (
            "most tokens per step",
            f"{tokens:,}",
            f"samples x (data.train.max_tokens={data.train.max_tokens} + "
            f"sampling.max_tokens={sampling.max_tokens})",
        ),
        (
            "most packed tokens per epoch",
            f"{packed:,}",
            f"train.share_prompts={train.share_prompts}: a group's prompt is computed "
            + ("once per microbatch" if train.share_prompts else "for every sample"),
        ),
        (
            "most microbatches per epoch",
            f"{-(-packed // train.microbatch_tokens):,}",
            f"packed tokens / train.microbatch_tokens={train.microbatch_tokens}, over all replicas",
        ),
    ]


def _role_line(config: Config, name: str, placement: Placement) -> str:
    samples = config.data.prompts_per_step * config.data.group_size
    each = samples / placement.num_replicas
    axes = " x ".join(f"{axis}={n}" for axis, n in placement.degrees.items() if n > 1)
    return (
        f"{name:<12} ranks {format_ranks(placement.ranks):<10} ({config.roles[name].ranks})  "
        f"{axes or 'one rank'}: {placement.num_replicas} replicas, about {each:g} samples each"
    )


def _weights(config: Config, placements: dict[str, Placement]) -> list[str]:
    """For each rollout, which tensors are the trainer's own, copied, or gathered; then memory."""
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_cuda else "cpu")
    shapes: dict[str, ModelConfig] = {}
    for name in placements:
        if ":" in config.role_kind(name):
            continue
        shape = read_config(config.model_path(name))
        shapes[name] = tiny(shape) if config.model.tiny else shape
        check_model(config, name, placements[name], shapes[name])
    num_ranks = 1 + max(rank for placement in placements.values() for rank in placement.ranks)
    plan = plan_roles(config, placements, shapes, [device.type] * num_ranks)
    lines = [f"dtype {training_dtype(config, device)} on {device.type}"]
    policy = next((name for name in shapes if config.role_kind(name) == "policy"), None)
    for name in (n for n in shapes if config.role_kind(n) == "rollout"):
        if name not in plan.syncs:
            lines.append(f"{name}: read from {config.model_path(name)}")
            continue
        lines.append(f"{policy} -> {name}: {plan.syncs[name].describe()}")
        lines += [f"  {line}" for line in plan.syncs[name].tensor_lines(plan.layouts[name])]
    texts = dict.fromkeys(memory.plan.describe() for memory in plan.memory.values())
    return [*lines, "", "# memory", *texts]
