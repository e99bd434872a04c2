"""Assembly of working roles from a configuration: meshes, backends, engine, weight sync.

Every rank runs all of this, whether it belongs to a role or not: meshes are made collectively.
Models are checked before the first mesh, so that bad input fails at once on every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from spmdrl.config.sections import Config
from spmdrl.distributed.groups import ProcessGroups
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.reduce import agreed
from spmdrl.memory.call_memory import CallMemory, planned_call_memory
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.host_state import HostState
from spmdrl.models.config import ModelConfig
from spmdrl.models.cpu_products import check_cpu_products, set_cpu_products
from spmdrl.models.files.hf import TensorSource, open_model
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.placement import place_roles
from spmdrl.planning.engines import check_installed, engine_parts
from spmdrl.planning.memory import cache_limit
from spmdrl.planning.plan import RolePlan, plan_roles
from spmdrl.role_spec import HEADS, RoleSpec
from spmdrl.roles.calls import Role
from spmdrl.roles.canary import Canary
from spmdrl.roles.custom import DECLARED, CustomRole, RoleContext, declared_bytes
from spmdrl.roles.generation import KV_CACHE
from spmdrl.roles.handles import HANDLES, Policy, Reward, Rollout
from spmdrl.roles.judge import Judge
from spmdrl.roles.model_calls import BASE, WEIGHTS, ModelRole
from spmdrl.roles.policy_sync import PolicySync
from spmdrl.roles.turn_calls import NO_TURNS, AllTurns
from spmdrl.rollout.protocol import RolloutEngine
from spmdrl.run.assembled import Assembly, Base
from spmdrl.run.assembly.make_backend import make_backend, train_options
from spmdrl.run.assembly.make_engine import make_engine
from spmdrl.run.assembly.register_engine import register_engine
from spmdrl.run.assembly.role_weights import (
    adapter_notes,
    fill_engine,
    head_source,
    readout_lines,
    role_weights,
)
from spmdrl.training.protocol import TrainBackend
from spmdrl.weights.sync import WeightSync
from spmdrl.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A role's model: configuration and weights, without its adapter's."""

    model: ModelConfig
    weights: TensorSource


def open_models(config: Config) -> dict[str, Model]:
    """Open every role's model, without a collective.

    Raises:
        ValueError: missing or foreign files, or an unsupported architecture.
    """
    models = {}
    said: set[str] = set()

    def say(level: int, text: str) -> None:
        if text not in said and not (dist.is_initialized() and dist.get_rank()):
            log.log(level, "%s", text)
        said.add(text)

    for name, role in config.roles.items():
        if config.is_users(name):
            continue
        path, head = config.model_path(name), HEADS.get(config.role_kind(name), "lm")
        opened, weights = open_model(
            path,
            head=head,
            head_init=role.head if config.model.tiny else head_source(name, role, path, head),
            use_tiny=config.model.tiny,
            seed=config.seed,
            warn=partial(say, logging.WARNING),
            inform=partial(say, logging.INFO),
        )
        models[name] = Model(model=opened, weights=weights)
    return models


def plan_models(config: Config, world: World, models: Mapping[str, Model]) -> RolePlan:
    """Plan the roles for the world's ranks; the first rank warns of adapters of other models.

    Raises:
        ValueError: as `plan_roles`, or an adapter's files do not fit a rollout's model.
    """
    placements = place_roles(config, world.size, world.local_size)
    opened = {name: opened.model for name, opened in models.items()}
    plan = plan_roles(
        config, placements, opened, world.device_types, world.local_size, world.gpu_bytes
    )
    for note in adapter_notes(plan.specs.values()):
        if world.is_first:
            log.warning("%s", note)
    for line in readout_lines(plan.specs.values()):
        if world.is_first:
            log.info("%s", line)
    return plan


def assemble(
    config: Config,
    world: World,
    models: Mapping[str, Model],
    texts: TokenTexts | None,
    plan: RolePlan | None = None,
    turns: AllTurns = NO_TURNS,
    judges: Mapping[str, TokenTexts] | None = None,
) -> Assembly:
    """Make every role on every rank, in `building_order`.

    Each role's parts move to their place (host or device) before the next role is built, so that
    the start needs no more memory than the run.

    Args:
        texts: texts of tokens, for rollouts; None: no stop texts.
        plan: plan of the same configuration, placements and models; None: it is made here.
        turns: those that samples take.
        judges: texts of judges' own tokens; None: there is no judge.

    Raises:
        ValueError: an engine is not installed or does not support the model, or a processor lacks
            the products that are asked for; on every rank.
    """
    agreed(ValueError, lambda: check_cpu_products(config.model.cpu_products))
    set_cpu_products(config.model.cpu_products)
    placements = place_roles(config, world.size, world.local_size)
    if plan is None:
        plan = plan_models(config, world, models)
    for spec in plan.specs.values():
        check_installed(spec)
    groups = ProcessGroups()
    meshes = {
        name: Mesh(name, p.ranks, p.degrees, plan.devices[name], groups)
        for name, p in placements.items()
    }
    builder = _Builder(config, world, plan, groups)
    for name in building_order(config):
        mesh = meshes[name]
        if config.is_users(name):
            builder.add_custom(name, mesh)
        elif (spec := plan.specs[name]).is_rollout:
            builder.add_rollout(spec, mesh, models[name], texts, turns)
        elif spec.is_judge:
            assert judges is not None, f"the texts of {name}'s tokens are missing"
            builder.add_judge(spec, mesh, models[name], judges[name])
        else:
            builder.add_model(spec, mesh, models[name])
    return builder.assembly()


def building_order(config: Config) -> list[str]:
    """Order the roles so that each comes after those whose tensors it may use: owners of a base
    before the roles that share it, and rollouts, which may use the policy's tensors, last.
    """

    def place(name: str) -> tuple[bool, bool]:
        return config.role_kind(name) == "rollout", config.roles[name].base is not None

    return sorted(config.roles, key=place)


class _Builder:
    """Builder of roles, one after the other; it registers their parts."""

    def __init__(self, config: Config, world: World, plan: RolePlan, groups: ProcessGroups) -> None:
        self._config, self._world, self._plan, self._groups = config, world, plan, groups
        own = plan.memory.get(world.rank)  # a rank may have no role
        self._residencies = {} if own is None else own.plan.residencies
        capacity = None if own is None else own.plan.capacity
        self._windowed = {} if own is None else own.windowed
        self._parts = DeviceParts(world.device, capacity=capacity)
        self._memory = CallMemory(parts=self._parts)
        if own is not None:
            self._memory = planned_call_memory(self._parts, own.plan, own.working_bytes, own.splits)
        self._roles: dict[str, Role] = {}
        self._backends: dict[str, TrainBackend | None] = {}
        self._trained: dict[str, ModelRole] = {}
        self._bases: dict[str, Base] = {}
        self._syncs: dict[tuple[str, str], PolicySync] = {}

    def _device(self, name: str) -> torch.device:
        """The device of the role on this rank."""
        on_cuda = self._plan.devices[name] == "cuda"
        return self._world.device if on_cuda else torch.device("cpu")

    def _memory_of(self, name: str) -> CallMemory | None:
        """None for a role on the host of a rank with a GPU: it shares no device memory."""
        shares = self._plan.devices[name] == self._world.device.type
        return self._memory if shares else None

    def add_model(self, spec: RoleSpec, mesh: Mesh, model: Model) -> None:
        name = spec.name
        options = train_options(self._config, spec, self._plan.blocks[name])
        if name in self._windowed:
            state = HostState(self._device(name), meter=self._parts.meter)
            options = options.model_copy(update={"host_state": state})
        weights = role_weights(spec, model.weights, self._config.seed)
        base = None if spec.base is None else self._backends[spec.base]
        backend = make_backend(spec, mesh, weights, options, self._device(name), base)
        self._backends[name] = backend
        memory = self._memory_of(name)
        role = HANDLES[spec.kind](name, mesh, spec.model, backend, memory)
        if isinstance(role, Reward):
            role.skipped = spec.skipped
        self._roles[name] = role
        if spec.trained:
            self._trained[name] = role
            if spec.has_fixed_base:
                self._bases[name] = Base(path=spec.path, weights=model.weights)
        if backend is None or memory is None:
            return
        parts = backend.parts()
        for part, tensors in parts.items():
            # the weights rest on the base: a call that needs them needs it
            under = parts.get(BASE, []) if part == WEIGHTS else []
            self._parts.registry.register(
                name,
                part,
                tensors=[*under, *tensors],
                residency=self._residencies[name, part],
                frozen=part == BASE or not spec.trained,
            )
        self._parts.settle()

    def add_rollout(
        self,
        spec: RoleSpec,
        mesh: Mesh,
        model: Model,
        texts: TokenTexts | None,
        turns: AllTurns,
    ) -> None:
        name, memory = spec.name, self._memory_of(spec.name)
        engine, parts = self._engine(spec, mesh, texts)
        role = Rollout(name, mesh, spec.model, engine, memory, parts, turns)
        self._roles[name] = role
        policy = next((r for r in self._roles.values() if isinstance(r, Policy)), None)
        if policy is not None:
            self._syncs[policy.name, name] = self._sync(policy, role, engine)
        elif engine is not None:
            # without a policy the rollout reads its model's files
            self._fill(spec, engine, model)
        if engine is not None and memory is not None:
            self._register_engine(spec, engine)
            self._parts.settle()

    def add_judge(self, spec: RoleSpec, mesh: Mesh, model: Model, texts: TokenTexts) -> None:
        name, memory = spec.name, self._memory_of(spec.name)
        engine, parts = self._engine(spec, mesh, texts)
        self._roles[name] = Judge(name, mesh, spec.model, engine, memory, parts)
        if engine is None:
            return
        self._fill(spec, engine, model)
        if memory is not None:
            self._register_engine(spec, engine)
            self._parts.settle()

    def _engine(
        self, spec: RoleSpec, mesh: Mesh, texts: TokenTexts | None
    ) -> tuple[RolloutEngine | None, tuple[str, ...]]:
        """Make a role's engine, without weights, and name the parts that its calls need."""
        name, memory = spec.name, self._memory_of(spec.name)
        moves = memory is not None and mesh.is_member and self._residencies[name, WEIGHTS] != "keep"
        engine = make_engine(
            self._config,
            spec,
            mesh,
            self._device(name),
            texts,
            sleeps=moves,
            cache_bytes=cache_limit(self._plan.memory, spec),
        )
        captured = engine is not None and engine.captures_graphs
        return engine, engine_parts(spec, captures_graphs=captured)

    def _fill(self, spec: RoleSpec, engine: RolloutEngine, model: Model) -> None:
        owner = None if spec.base is None else self._backends[spec.base]
        base = {} if owner is None else owner.local_tensors()
        table = self._plan.layouts[spec.name][self._world.rank]
        fill_engine(spec, engine, table, model.weights, base, self._config.seed)

    def _sync(self, policy: Policy, role: Rollout, engine: RolloutEngine | None) -> PolicySync:
        plan, world, config = self._plan, self._world, self._config
        spec, adapter = plan.specs[role.name], plan.specs[policy.name].adapter
        source, target = plan.layouts[policy.name], plan.layouts[role.name]
        weights = WeightSync(
            plan.syncs[role.name],
            source.get(world.rank, {}),
            target.get(world.rank, {}),
            {} if policy.backend is None else policy.backend.local_tensors(),
            engine,
            # a world of gloo alone sends from the host
            world.device if set(world.device_types) == {"cuda"} else torch.device("cpu"),
            read=self._parts.view,
            merged=adapter if spec.adapter is None else None,
            keeps_frozen=not any(
                memory.plan.residencies.get((role.name, WEIGHTS)) == "drop"
                for memory in plan.memory.values()
            ),
            groups=self._groups,
        )
        canary = Canary(
            world,
            num_replicas=len(role.mesh.replicas()),
            vocab_size=spec.model.vocab_size,
            dtype=spec.dtype,
            # vLLM scores rows only at temperature 1
            temperature=1.0 if spec.is_vllm else config.sampling.temperature,
        )
        own = plan.memory.get(world.rank)
        return PolicySync(
            policy,
            role,
            weights,
            self._memory,
            streams=own is not None and own.syncs_from_host,
            check_every=config.rollout.sync_check_every,
            canary=canary if config.rollout.sync_check_every else None,
            adapter=adapter,
        )

    def _register_engine(self, spec: RoleSpec, engine: RolloutEngine) -> None:
        own = self._plan.memory.get(self._world.rank)
        sizes = {} if own is None else {part.key: part.num_bytes for part in own.plan.parts}
        register_engine(
            spec, engine, self._parts.registry, self._residencies, sizes.get((spec.name, KV_CACHE))
        )

    def add_custom(self, name: str, mesh: Mesh) -> None:
        user, memory = self._plan.users[name], self._memory_of(name)
        self._roles[name] = CustomRole(name, mesh, user, memory)
        if mesh.is_member:
            user.setup(
                RoleContext(
                    name=name,
                    mesh=mesh,
                    device=self._device(name),
                    model=self._config.model_path(name),
                    seed=self._config.seed,
                )
            )
            if memory is not None and (size := declared_bytes(user)) is not None:
                self._parts.registry.register_fixed(name, DECLARED, num_bytes=size)

    def assembly(self) -> Assembly:
        return Assembly(
            specs=self._plan.specs,
            roles={name: self._roles[name] for name in self._config.roles},
            trained=self._trained,
            layouts=self._plan.layouts,
            state_layouts=self._plan.state_layouts,
            syncs=self._syncs,
            parts=self._parts,
            bases=self._bases,
        )
