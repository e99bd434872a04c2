"""From a configuration to roles that work: meshes, backends, engine, weight sync.

Every rank runs all of this alike, members of a role or not: meshes are made collectively. Models
are checked before the first of them, so that bad input fails at once and everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from spmdrl.config import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel
from spmdrl.launch import World
from spmdrl.models.config import ModelConfig
from spmdrl.models.hf import TensorSource, fill, open_model
from spmdrl.models.sharding import check_tp
from spmdrl.placement import Placement, place_roles
from spmdrl.roles import Policy, Reference, Rollout
from spmdrl.rollout.native.engine import NativeEngine, NativeOptions
from spmdrl.training.options import TrainOptions
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.weights.layout import Held, WeightLayout, model_layout
from spmdrl.weights.sync import WeightSync

Roles = Mapping[str, Policy | Reference | Rollout]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The roles by name, what each rank holds of their models, and the syncs between them."""

    roles: Roles
    layouts: Mapping[str, WeightLayout]
    syncs: Mapping[tuple[str, str], WeightSync]

    def trained(self) -> dict[str, Policy]:
        return {name: role for name, role in self.roles.items() if isinstance(role, Policy)}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A role's model: configuration and weights."""

    config: ModelConfig
    weights: TensorSource


def training_dtype(config: Config, device: torch.device) -> torch.dtype:
    """`model.dtype`; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def open_models(config: Config, placements: Mapping[str, Placement]) -> dict[str, Model]:
    """Every role's model, checked against its parallel degrees. No collective takes part.

    Raises:
        ValueError: missing or foreign files, an unsupported architecture, a degree that does not
            divide the model.
    """
    models = {}
    opened: dict[str, Model] = {}
    for name in config.roles:
        path = str(config.model_path(name))
        if path not in opened:
            shape, weights = open_model(path, use_tiny=config.model.tiny, seed=config.seed)
            opened[path] = Model(config=shape, weights=weights)
        models[name] = opened[path]
        check_tp(models[name].config, placements[name].degrees["tp"])
    return models


def assemble(
    config: Config,
    world: World,
    models: Mapping[str, Model],
    decode: Decode,
    progress: Callable[[int, int], None] | None = None,
) -> Assembly:
    """Make every role on every rank, in the configuration's order."""
    placements = place_roles(config, world.size)
    meshes = {
        name: Mesh(name, p.ranks, p.degrees, world.device.type) for name, p in placements.items()
    }
    layouts = {
        name: role_layout(config, p, models[name].config, name, world.device)
        for name, p in placements.items()
    }
    roles: dict[str, Policy | Reference | Rollout] = {}
    for name in config.roles:
        kind, mesh, model = config.role_kind(name), meshes[name], models[name]
        if kind == "rollout":
            engine = _engine(config, world, mesh, model, decode)
            roles[name] = Rollout(name, mesh, model.config, engine, progress)
        elif kind == "policy":
            backend = _backend(config, world, mesh, model, trainable=True)
            roles[name] = Policy(name, mesh, model.config, backend)
        elif kind == "reference":
            backend = _backend(config, world, mesh, model, trainable=False)
            roles[name] = Reference(name, mesh, model.config, backend)
        else:
            raise ValueError(f"roles.{name}.kind={kind!r}: it must be policy, reference or rollout")
    return Assembly(roles=roles, layouts=layouts, syncs=_syncs(roles, layouts, models, world))


def role_layout(
    config: Config, placement: Placement, shape: ModelConfig, name: str, device: torch.device
) -> WeightLayout:
    """What every rank holds of a role's model (a rollout's weights are never sharded)."""
    degrees = dict(placement.degrees)
    if config.role_kind(name) == "rollout":
        degrees["dp_replicate"] *= degrees["dp_shard"]
        degrees["dp_shard"] = 1
    dtype = training_dtype(config, device)
    if degrees["dp_shard"] > 1:
        dtype = torch.float32  # FSDP2 keeps the sharded masters, and casts while it gathers
    return model_layout(shape, placement.ranks, degrees, dtype)


def _backend(
    config: Config, world: World, mesh: Mesh, model: Model, *, trainable: bool
) -> TorchBackend | None:
    if not mesh.is_member:
        return None
    return TorchBackend(
        mesh,
        model.config,
        model.weights,
        train_options(config, world.device),
        world.device,
        trainable=trainable,
    )


def train_options(config: Config, device: torch.device) -> TrainOptions:
    train = config.train
    return TrainOptions(
        microbatch_tokens=train.microbatch_tokens,
        share_prompts=train.share_prompts,
        recompute=train.recompute,
        attention=config.model.attention,
        lr=train.lr,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        total_steps=config.steps * train.epochs * train.num_minibatches,
        min_lr_ratio=train.min_lr_ratio,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        head_chunk=train.head_chunk,
        param_dtype=training_dtype(config, device),
    )


def _engine(
    config: Config, world: World, mesh: Mesh, model: Model, decode: Decode
) -> NativeEngine | None:
    if not mesh.is_member:
        return None
    tp = Parallel(group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp"))
    rollout = config.rollout
    options = NativeOptions(
        kv_cache_gb=rollout.kv_cache_gb,
        block_size=rollout.block_size,
        max_running=rollout.max_running,
        prefill_tokens=rollout.prefill_tokens,
        cuda_graphs=rollout.cuda_graphs,
    )
    return NativeEngine(
        model.config,
        tp=tp,
        options=options,
        device=world.device,
        dtype=training_dtype(config, world.device),
        eos_token_ids=model.config.eos_ids,
        detokenize=decode,
    )


def _syncs(
    roles: Roles,
    layouts: Mapping[str, WeightLayout],
    models: Mapping[str, Model],
    world: World,
) -> dict[tuple[str, str], WeightSync]:
    """From the policy to each rollout; without a policy the rollout reads its model's files."""
    policies = [name for name, role in roles.items() if isinstance(role, Policy)]
    syncs = {}
    for name, role in roles.items():
        if not isinstance(role, Rollout):
            continue
        engine = role.engine
        assert engine is None or isinstance(engine, NativeEngine)
        if policies:
            source = policies[0]
            policy = roles[source]
            assert isinstance(policy, Policy)
            tensors = policy.backend.local_tensors() if policy.backend is not None else None
            syncs[source, name] = WeightSync(
                layouts[source], layouts[name], tensors, engine, world.device
            )
        elif engine is not None:
            _load_engine(engine, layouts[name][world.rank], models[name])
    return syncs


def _load_engine(engine: NativeEngine, held: Mapping[str, Held], model: Model) -> None:
    fill(((engine.allocate(name), here.slices) for name, here in held.items()), model.weights)
