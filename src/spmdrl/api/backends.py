"""Names that a train backend of a user's own is built from, and the contracts it is held to.

`spmdrl.api` has the protocols of systems, backends and engines, and what all users need. Here are
the parts that the package's own backends are made of; docs/backends.md makes one of them. Names are
looked up when they are used, as there.

- What a system describes a role with, from shapes: `ModelConfig`, `Adapter`, `Head`, `Mesh`,
  `TensorSource`, `Slice`, `LocalShard`, `Table`, `WeightLayout`, `model_layout`, `frozen_names`,
  `check_degrees`.
- A decoder with its adapter as leaves: `RoleWeights`, `own_weights`, `borrowed_weights`, `Leaf`,
  `fill_leaves`, `refresh_weights`, `check_borrowing`; tensors of one's own are filled by `fill`.
- A pass over rows: `pack_rows`, `counted`, `check_head`, `require_parts`, `support_of`,
  `read_places`, `whole_stream`, `as_columns`, `Microbatch`, `LocalStream`, `split_stream`,
  `MicrobatchProgress`, `to_device`; its attention: `PackedAttention`, `make_kernel`,
  `resolve_attention`, `attention_needs`, `attention_options`.
- Losses and metrics: `loss_input`, `nothing_read`, `as_numbers`, `over_replicas`, `loss_of`,
  `combine`.
- A step: `StepCounts`, `require_trainable`, `Optimizer`, `all_reduce_gradients`, `gradient_norm`,
  `MOMENTS`.
- The contracts: `check_backend`, `Candidate`, `Layout`, `check_engine`, `EngineCandidate`,
  `Report`, `ContractError`.
"""

# sorting would give each `name as name` a statement of its own
# ruff: noqa: I001

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from spmdrl.api.lazy import getter, places

if TYPE_CHECKING:
    from spmdrl.algorithms.metrics import combine as combine
    from spmdrl.distributed.mesh import Mesh as Mesh
    from spmdrl.memory.host_copies import to_device as to_device
    from spmdrl.models.adapters import Adapter as Adapter
    from spmdrl.models.attention import (
        PackedAttention as PackedAttention,
        make_kernel as make_kernel,
        resolve_attention as resolve_attention,
    )
    from spmdrl.models.config import ModelConfig as ModelConfig
    from spmdrl.models.files.hf import (
        TensorSource as TensorSource,
        fill as fill,
    )
    from spmdrl.models.layer_attention import (
        attention_needs as attention_needs,
        attention_options as attention_options,
    )
    from spmdrl.models.local_shards import (
        LocalShard as LocalShard,
        Table as Table,
        WeightLayout as WeightLayout,
    )
    from spmdrl.models.sharding import Head as Head
    from spmdrl.models.tensors import Slice as Slice
    from spmdrl.planning.frozen import frozen_names as frozen_names
    from spmdrl.planning.systems.degrees import check_degrees as check_degrees
    from spmdrl.testing.backend_contract import check_backend as check_backend
    from spmdrl.testing.clause import (
        ContractError as ContractError,
        Report as Report,
    )
    from spmdrl.testing.engine_contract import check_engine as check_engine
    from spmdrl.testing.engine_subject import EngineCandidate as EngineCandidate
    from spmdrl.testing.subject import (
        Candidate as Candidate,
        Layout as Layout,
    )
    from spmdrl.training.backend_steps import (
        StepCounts as StepCounts,
        as_columns as as_columns,
        as_numbers as as_numbers,
        check_borrowing as check_borrowing,
        check_head as check_head,
        counted as counted,
        loss_input as loss_input,
        nothing_read as nothing_read,
        over_replicas as over_replicas,
        pack_rows as pack_rows,
        read_places as read_places,
        require_parts as require_parts,
        require_trainable as require_trainable,
        support_of as support_of,
        whole_stream as whole_stream,
    )
    from spmdrl.training.body import (
        RoleWeights as RoleWeights,
        borrowed_weights as borrowed_weights,
        own_weights as own_weights,
    )
    from spmdrl.training.context import (
        LocalStream as LocalStream,
        split_stream as split_stream,
    )
    from spmdrl.training.optimizer import (
        MOMENTS as MOMENTS,
        Optimizer as Optimizer,
        all_reduce_gradients as all_reduce_gradients,
        gradient_norm as gradient_norm,
    )
    from spmdrl.training.packing import Microbatch as Microbatch
    from spmdrl.training.protocol import (
        MicrobatchProgress as MicrobatchProgress,
        loss_of as loss_of,
    )
    from spmdrl.training.weights import (
        Leaf as Leaf,
        fill_leaves as fill_leaves,
        refresh_weights as refresh_weights,
    )
    from spmdrl.weights.layout import model_layout as model_layout

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "algorithms.metrics": "combine",
        "distributed.mesh": "Mesh",
        "memory.host_copies": "to_device",
        "models.adapters": "Adapter",
        "models.attention": "PackedAttention make_kernel resolve_attention",
        "models.config": "ModelConfig",
        "models.files.hf": "TensorSource fill",
        "models.layer_attention": "attention_needs attention_options",
        "models.local_shards": "LocalShard Table WeightLayout",
        "models.sharding": "Head",
        "models.tensors": "Slice",
        "planning.frozen": "frozen_names",
        "planning.systems.degrees": "check_degrees",
        "testing.backend_contract": "check_backend",
        "testing.clause": "ContractError Report",
        "testing.engine_contract": "check_engine",
        "testing.engine_subject": "EngineCandidate",
        "testing.subject": "Candidate Layout",
        "training.backend_steps": (
            "StepCounts as_columns as_numbers check_borrowing check_head counted loss_input "
            "nothing_read over_replicas pack_rows read_places require_parts require_trainable "
            "support_of whole_stream"
        ),
        "training.body": "RoleWeights borrowed_weights own_weights",
        "training.context": "LocalStream split_stream",
        "training.optimizer": "MOMENTS Optimizer all_reduce_gradients gradient_norm",
        "training.packing": "Microbatch",
        "training.protocol": "MicrobatchProgress loss_of",
        "training.weights": "Leaf fill_leaves refresh_weights",
        "weights.layout": "model_layout",
    }
)
"""Module -> its names in this one."""

_PLACES = places(_NAMES)

__all__ = sorted(_PLACES)

if not TYPE_CHECKING:  # a type checker knows the names from the imports above, and no others
    __getattr__ = getter(__name__, _PLACES)

    def __dir__() -> list[str]:
        return __all__
