"""`Engine`: DeepSpeed's engine over a role's own groups. The only importer of deepspeed, late.

DeepSpeed 0.19.8 is made for one engine in a process whose ranks are the world. What it does beyond
that, and the remedy for each:

- Without an `mpu` its engine makes a group of the whole world, where ranks outside the role never
  arrive. Each engine has an `mpu` over its role's groups, whose "data parallel" ranks are all that
  have other rows or tokens (dp_replicate x dp_shard x cp).
- That `mpu` is also a global of `deepspeed.utils.groups`, which ZeRO 1 in bfloat16 asks again
  whenever it reduces: `Engine` sets it before each of its calls, as it does `_RoleComm`.
- On a CPU its communication module compiles an extension for shared memory when it starts; the
  table of what can be compiled says that this one cannot.
- The accelerator is guessed when the package is imported; `DS_ACCELERATOR` decides it before.
- ZeRO 3 waits for the whole world while it starts, and compares the order of modules with that of
  rank 0 of the world whenever it records it: `_RoleComm` makes of the world the role's ranks.
- ZeRO 3 keeps a stack of the modules that compute. A recomputation ends when it has what it needs,
  within its last module, which then stays gathered for its backward, and on the stack: `backward`
  takes it off. (A recomputation of the whole layer would release what its backward needs.)
- ZeRO 3 asks for the number of devices at each reduction; on a CPU that starts a program, unless
  `LOCAL_SIZE` says it.
- Its logger reports every engine at the level of warnings, and one optimizer prints the memory that
  it uses: errors remain.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spmdrl.distributed.mesh import Mesh, group_backend


class RoleGroups:
    """A role's groups under the names by which DeepSpeed asks an `mpu`."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        solo: dist.ProcessGroup | None = None
        self._groups: dict[str, dist.ProcessGroup] = {}
        for axis in ("reduce", "tp"):
            group = mesh.group(axis)
            if group is None:
                solo = _solo(device) if solo is None else solo
                group = solo
            self._groups[axis] = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["reduce"]

    def get_data_parallel_rank(self) -> int:
        return self._groups["reduce"].rank()

    def get_data_parallel_world_size(self) -> int:
        return self._groups["reduce"].size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups["reduce"])

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["tp"]

    def get_model_parallel_rank(self) -> int:
        return self._groups["tp"].rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups["tp"].size()


def _solo(device: torch.device) -> dist.ProcessGroup:
    """Make a group of this rank. Only this rank does: others know nothing of it."""
    backend = group_backend(device.type, dist.get_backend_config())
    ranks = [dist.get_rank()]
    group: dist.ProcessGroup = dist.new_group(
        ranks, backend=backend, use_local_synchronization=True
    )
    return group


class Engine:
    """DeepSpeed's engine, which wraps a module and the optimizer of its parameters.

    It is made in steps: `shard` (ZeRO 3), then `start`.

    Args:
        settings: DeepSpeed's configuration, see `settings`.
    """

    def __init__(self, settings: Mapping[str, Any], mesh: Mesh, device: torch.device) -> None:
        self._deepspeed, self._device = _imported(device), device
        self._settings = dict(settings)
        self._groups = RoleGroups(mesh, device)
        self._comm = _RoleComm(
            _communication(self._deepspeed), self._groups.get_data_parallel_group()
        )
        self._engine: Any = None
        self.has_gradient = False
        """Whether a microbatch was added since the last step; equal on all ranks of the role."""

    @property
    def optimizer(self) -> Any:
        """The ZeRO optimizer, of a class that depends on the stage and the dtype."""
        return self._engine.optimizer

    def shard(self, module: nn.Module) -> None:
        """Divide a module's parameters, which are allocated here, one after another; their values
        are not defined yet. Each becomes another object.
        """
        group = self._groups.get_data_parallel_group()
        convert: Callable[..., None] | None = None
        self._use()
        for owner in list(module.modules()):
            for name, meta in list(owner.named_parameters(recurse=False)):
                own = torch.empty(meta.shape, dtype=meta.dtype, device=self._device)
                parameter = nn.Parameter(own, requires_grad=meta.requires_grad)
                owner.register_parameter(name, parameter)
                if convert is not None:
                    convert(param_list=[parameter])
                    continue
                holder = nn.Module()
                holder.register_parameter("first", parameter)
                self._deepspeed.zero.Init(
                    module=holder,
                    data_parallel_group=group,
                    dtype=parameter.dtype,
                    config_dict_or_path=self._settings,
                    mpu=self._groups,
                )
                convert = vars(parameter)["convert_to_zero_parameters"]

    def start(self, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Make the engine.

        Args:
            module: what the engine calls; without `shard`, all of its parameters are trained.
            optimizer: over the parameters that train; ZeRO replaces them by flat float32 parts.
        """
        self._use()
        with redirect_stdout(io.StringIO()):
            self._engine, *_ = self._deepspeed.initialize(
                model=module, optimizer=optimizer, config=self._settings, mpu=self._groups
            )

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._engine(*arguments, **named)

    def accumulate(self) -> None:
        """Expect microbatches, none of which is known to be the last one of its step."""
        self._use()
        self._engine.set_gradient_accumulation_boundary(False)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a microbatch's loss."""
        self.has_gradient = True
        modules = self._deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        depth = len(modules)
        self._engine.backward(loss)
        del modules[depth:]

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Release, in the end, what of the weights ZeRO 3 has gathered and would keep for later."""
        self._use()
        yield
        if self._engine.zero_optimization_partition_weights():
            self.optimizer.empty_partition_cache()

    def reduce(self) -> None:
        """Sum over ranks what they have added, into the part that each of them updates."""
        self._use()
        self.has_gradient = False
        self._engine.set_gradient_accumulation_boundary(True)
        if self._engine.zero_optimization_stage() == 1:
            self._engine.allreduce_gradients()
        else:
            self.optimizer.finalize_gradient_accumulation_boundary()

    def _use(self) -> None:
        """Make this role's groups those of the process, see the top of this file."""
        self._deepspeed.utils.groups.mpu = self._groups
        self._deepspeed.comm.comm.cdb = self._comm


class _RoleComm:
    """DeepSpeed's communication module, to which the ranks that ZeRO divides over are the world
    where no group is named.

    Args:
        world: the module.
    """

    def __init__(self, world: Any, group: dist.ProcessGroup) -> None:
        self._world, self._group = world, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def get_rank(self, group: Any = None) -> int:
        return int(self._world.get_rank(group=self._group if group is None else group))

    def barrier(self, group: Any = None, **named: Any) -> Any:
        return self._world.barrier(group=self._group if group is None else group, **named)

    def broadcast(self, tensor: Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
        if group is None:
            group, src = self._group, dist.get_process_group_ranks(self._group)[src]
        return self._world.broadcast(tensor, src, group=group, async_op=async_op)


def _communication(deepspeed: Any) -> Any:
    """Return DeepSpeed's communication module, made once in a process."""
    comm = deepspeed.comm.comm
    if comm.cdb is None:
        accelerator = deepspeed.accelerator.get_accelerator()
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())
    return comm.cdb._world if isinstance(comm.cdb, _RoleComm) else comm.cdb


def _imported(device: torch.device) -> Any:
    """Import deepspeed for a role on this device, and make its communication module once."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cpu":
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # torch 2.13 renamed collectives that deepspeed calls by their old names
    old = "reduce_scatter_tensor|all_gather_into_tensor"
    warnings.filterwarnings("ignore", f".*({old}).* is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that it gives when it is imported
        import deepspeed
    deepspeed.utils.logger.setLevel("ERROR")
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != device.type:
        raise ValueError(
            f"DS_ACCELERATOR={found}, and a role that trains with deepspeed is on {device.type}: "
            f"set the environment's DS_ACCELERATOR={device.type}"
        )
    return deepspeed
