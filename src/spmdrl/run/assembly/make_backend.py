"""Construction of a role's train backend on this rank."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import TensorSource
from spmdrl.planning.layouts import frozen_names, megatron_options
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend
from spmdrl.training.torch_backend import TorchBackend

if TYPE_CHECKING:
    from spmdrl.training.megatron.backend import MegatronBackend


def make_backend(
    spec: RoleSpec,
    mesh: Mesh,
    weights: TensorSource,
    options: TrainOptions,
    device: torch.device,
    base: TrainBackend | None,
) -> TrainBackend | None:
    """Make the role's backend on this rank; None outside its mesh.

    Args:
        base: the backend whose weights it shares, or None for weights of its own.
    """
    if not mesh.is_member:
        return None
    plain = (spec.model, weights, options, device)
    kind: Any = {"trainable": spec.trained, "head": spec.head, "adapter": spec.adapter}
    if spec.backend == "megatron":
        megatron = import_backend()
        assert base is None or isinstance(base, megatron), spec.name
        return megatron(mesh, *plain, megatron_options(spec), base=base, **kind)
    assert base is None or isinstance(base, TorchBackend), spec.name
    return TorchBackend(mesh, *plain, base=base, **kind)


def import_backend() -> type[MegatronBackend]:
    """Import the Megatron backend's class, and megatron-core with it, only when it is needed."""
    with warnings.catch_warnings():
        # it warns several times that TransformerEngine and apex are missing, which is expected
        warnings.filterwarnings("ignore", message=".*[Aa]pex (is|are) not installed")
        from spmdrl.training.megatron.backend import MegatronBackend
    return MegatronBackend


def train_options(config: Config, spec: RoleSpec, blocks: int) -> TrainOptions:
    return TrainOptions(
        **spec.train.model_dump(),
        attention=config.model.attention,
        # there are none if the value's warm-up takes the whole run
        total_steps=max(1, config.num_optimizer_steps(spec.name)),
        param_dtype=spec.dtype,
        frozen=frozen_names(spec),
        blocks=blocks,
        seed=config.seed,
    )
