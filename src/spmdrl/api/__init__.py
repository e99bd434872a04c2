"""Names that a flow, role, reward, backend or model family of a user's own imports.

`from spmdrl.api import Run, Policy` stays valid where modules move. Importing this module imports
nothing else: a name is looked up when it is used, and torch comes with the first that needs it.

- A flow: `Run`, its halves `Environment` and `Trainer`, `Evaluates`, `Metrics`, `joined`,
  `update_metrics`; `Config`, `AlgorithmSection`, `PreferenceSection`, `response_tokens`.
- Rows: `Batch`, `concat`, `from_rows`, `group_index`; data: `DataSet`, `StepRows`, `home_rows`,
  `ItemSet`, `DataItem`, `items_of`, `Conversation`, `Pair`, `mismatched`.
- Roles: `Policy`, `Reference`, `Reward`, `Value`, `Rollout`, `CustomRole`; their calls: `Call`,
  `together`, `Generation`, `Update`, `UpdateRecords`, `LossFn`, `LossInput`.
- A family of models: `Family`, `Body`, `Fields`, `LayerSpec`, `NormSpec`; its blocks:
  `SoftmaxAttention`, `AttentionOptions`, `LatentAttention`, `GatedDelta`, `DenseMlp`, `MoeMlp`,
  `SharedExperts`, `ClampedSwiglu`; readings: `alike`, `dense_mlp`, `heads_of`, `layer_kinds`,
  `norm_of`, `num_experts_of`, `plain_attention`, `rope_of`, `ropes_of`, `windows_of`.
- Numbers of all ranks: `moments`, `Moments`, `world_any`, `world_max`, `world_sum`,
  `broadcast_object`, `gather_objects`, `gather_tables`; evaluations: `clustered_mean`,
  `pair_accuracy`, `CHOSEN`, `EVAL`, `ACCURACY`, `STANDARD_ERROR`; `Tracker`, `TrackedRun`.
- A role of one's own: `UserRole`, `Column`, `RoleContext`; with a model of the train backend:
  `TorchBackend`, `TrainOptions`, `open_model`, `Readout`, `SCORES`, `VALUES`, `next_token`.
- Turns: `TurnEnvironment`, `Observation`; a parser of calls of tools: `ToolCalls`, `ToolCall`.
- A backend or an engine: `TrainSystem`, `Traffic`, `TrainMemory`, `plain_memory`, `RoleSpec`,
  `TrainBackend`, `OptimStep`, `LocalTensors`; `RolloutEngine`, `Request`, `Completion`,
  `Finish`, `SamplingParams`; adapters: `OWN`, `open_adapter`, `read_adapter`.
- Parts of shipped flows: `GroupEnvironment`, `GrpoTrainer`, `PpoTrainer`, `PpoRewards`,
  `DpoTrainer`, `OnlineDpoTrainer`, `SftTrainer`, `RewardModelTrainer`, `HeldOutPreferences`.
- Their terms: `update_of`, `token_advantages`, `puts_kl_in_reward`, `policy_loss`,
  `policy_columns`, `with_loss_weights`; of pairs `pair_loss`, `pair_update`, `pair_metrics`,
  `judged_rows`, `with_pair_shares`, `log_ratio`, `distinct_rows`, `ReferenceSums`, `AskedSums`,
  `CachedSums`, `REFERENCE`, `BASELINE`.
- Advantages and rewards: `turn_advantages`, `turn_returns`, `turn_tokens`, `pays_turns`,
  `TURN_REWARDS`, `group_advantages`, `leave_one_out`, `rewards_to_go`,
  `broadcast_to_tokens`, `gae`, `whiten`, `has_signal`, `overlong_penalty`, `token_rewards`,
  `missing_eos_penalty`, `scale_and_clip`, `RewardScaler`; KL: `kl`, `kl_in_reward`, `sequence_kl`,
  `KlControl`, `FixedKl`, `AdaptiveKl`.
- Losses: `clipped_policy_loss`, `POLICY_COLUMNS`, `loss_weights`, `loss_shares`,
  `clipped_value_loss`, `VALUE_COLUMNS`, `explained_variance`, `next_token_loss`,
  `bradley_terry_loss`; of pairs `preference_loss`, `pair_rows`, `ordered_pairs`,
  `distinct_responses`, `response_sums`, `as_compared`, `implicit_rewards`, `kto_baseline`.

A copy of a shipped flow finds its imports here; `spmdrl.api.backends` is for train backends.
"""

# sorting would give each `name as name` a statement of its own
# ruff: noqa: I001

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from spmdrl.api.lazy import getter, places

if TYPE_CHECKING:
    from spmdrl.algorithms.advantages import (
        broadcast_to_tokens as broadcast_to_tokens,
        group_advantages as group_advantages,
        leave_one_out as leave_one_out,
        rewards_to_go as rewards_to_go,
        whiten as whiten,
    )
    from spmdrl.algorithms.direct_preference import (
        as_compared as as_compared,
        implicit_rewards as implicit_rewards,
        kto_baseline as kto_baseline,
        ordered_pairs as ordered_pairs,
        preference_loss as preference_loss,
        response_sums as response_sums,
        distinct_responses as distinct_responses,
        pair_rows as pair_rows,
    )
    from spmdrl.algorithms.kl import (
        kl as kl,
        AdaptiveKl as AdaptiveKl,
        FixedKl as FixedKl,
        KlControl as KlControl,
        sequence_kl as sequence_kl,
    )
    from spmdrl.algorithms.policy_loss import (
        POLICY_COLUMNS as POLICY_COLUMNS,
        clipped_policy_loss as clipped_policy_loss,
        loss_shares as loss_shares,
        loss_weights as loss_weights,
    )
    from spmdrl.algorithms.supervised import bradley_terry_loss as bradley_terry_loss
    from spmdrl.algorithms.reward_shaping import (
        RewardScaler as RewardScaler,
        missing_eos_penalty as missing_eos_penalty,
        scale_and_clip as scale_and_clip,
        token_rewards as token_rewards,
    )
    from spmdrl.algorithms.rewards import (
        has_signal as has_signal,
        kl_in_reward as kl_in_reward,
        overlong_penalty as overlong_penalty,
    )
    from spmdrl.algorithms.supervised import next_token_loss as next_token_loss
    from spmdrl.algorithms.turn_credit import (
        turn_advantages as turn_advantages,
        turn_returns as turn_returns,
        turn_tokens as turn_tokens,
    )
    from spmdrl.algorithms.value_loss import (
        gae as gae,
        VALUE_COLUMNS as VALUE_COLUMNS,
        clipped_value_loss as clipped_value_loss,
        explained_variance as explained_variance,
    )
    from spmdrl.batch import (
        Batch as Batch,
        concat as concat,
        from_rows as from_rows,
        group_index as group_index,
    )
    from spmdrl.config.algorithms import (
        AlgorithmSection as AlgorithmSection,
        PreferenceSection as PreferenceSection,
    )
    from spmdrl.config.data_sets import response_tokens as response_tokens
    from spmdrl.config.sections import Config as Config
    from spmdrl.data.conversations import Conversation as Conversation
    from spmdrl.data.item_set import (
        DataItem as DataItem,
        ItemSet as ItemSet,
        items_of as items_of,
    )
    from spmdrl.data.order import (
        DataSet as DataSet,
        StepRows as StepRows,
        home_rows as home_rows,
    )
    from spmdrl.data.preferences import (
        Pair as Pair,
        mismatched as mismatched,
    )
    from spmdrl.distributed.row_bytes import Column as Column
    from spmdrl.distributed.reduce import (
        Moments as Moments,
        broadcast_object as broadcast_object,
        gather_objects as gather_objects,
        gather_tables as gather_tables,
        moments as moments,
        world_any as world_any,
        world_max as world_max,
        world_sum as world_sum,
    )
    from spmdrl.evaluation.metrics import (
        clustered_mean as clustered_mean,
        CHOSEN as CHOSEN,
        pair_accuracy as pair_accuracy,
    )
    from spmdrl.flows.advantage_terms import (
        pays_turns as pays_turns,
        puts_kl_in_reward as puts_kl_in_reward,
        token_advantages as token_advantages,
    )
    from spmdrl.flows.dpo import DpoTrainer as DpoTrainer
    from spmdrl.flows.environment import GroupEnvironment as GroupEnvironment
    from spmdrl.flows.grpo import GrpoTrainer as GrpoTrainer
    from spmdrl.flows.held_out_preferences import (
        HeldOutPreferences as HeldOutPreferences,
        log_ratio as log_ratio,
    )
    from spmdrl.flows.online_dpo import OnlineDpoTrainer as OnlineDpoTrainer
    from spmdrl.flows.pair_verdicts import judged_rows as judged_rows
    from spmdrl.flows.policy_terms import (
        policy_columns as policy_columns,
        policy_loss as policy_loss,
        update_of as update_of,
        with_loss_weights as with_loss_weights,
    )
    from spmdrl.flows.ppo import PpoTrainer as PpoTrainer
    from spmdrl.flows.ppo_rewards import PpoRewards as PpoRewards
    from spmdrl.flows.preference_terms import (
        BASELINE as BASELINE,
        REFERENCE as REFERENCE,
        pair_loss as pair_loss,
        pair_metrics as pair_metrics,
        pair_update as pair_update,
        with_pair_shares as with_pair_shares,
    )
    from spmdrl.flows.reference_sums import (
        AskedSums as AskedSums,
        CachedSums as CachedSums,
        ReferenceSums as ReferenceSums,
        distinct_rows as distinct_rows,
    )
    from spmdrl.flows.reward_model import RewardModelTrainer as RewardModelTrainer
    from spmdrl.flows.sft import SftTrainer as SftTrainer
    from spmdrl.models.family import (
        Body as Body,
        Family as Family,
    )
    from spmdrl.models.family_parts import (
        alike as alike,
        dense_mlp as dense_mlp,
        heads_of as heads_of,
        layer_kinds as layer_kinds,
        norm_of as norm_of,
        num_experts_of as num_experts_of,
        plain_attention as plain_attention,
        rope_of as rope_of,
        ropes_of as ropes_of,
        windows_of as windows_of,
    )
    from spmdrl.models.fields import Fields as Fields
    from spmdrl.models.files.hf import open_model as open_model
    from spmdrl.models.files.peft import (
        open_adapter as open_adapter,
        read_adapter as read_adapter,
    )
    from spmdrl.models.local_shards import LocalTensors as LocalTensors
    from spmdrl.models.specs import (
        AttentionOptions as AttentionOptions,
        ClampedSwiglu as ClampedSwiglu,
        DenseMlp as DenseMlp,
        GatedDelta as GatedDelta,
        LatentAttention as LatentAttention,
        LayerSpec as LayerSpec,
        MoeMlp as MoeMlp,
        NormSpec as NormSpec,
        SharedExperts as SharedExperts,
        SoftmaxAttention as SoftmaxAttention,
    )
    from spmdrl.observe.names import (
        ACCURACY as ACCURACY,
        EVAL as EVAL,
        STANDARD_ERROR as STANDARD_ERROR,
    )
    from spmdrl.observe.trackers.protocol import TrackedRun as TrackedRun, Tracker as Tracker
    from spmdrl.roles.calls import (
        Call as Call,
        together as together,
    )
    from spmdrl.roles.custom import (
        CustomRole as CustomRole,
        RoleContext as RoleContext,
        UserRole as UserRole,
    )
    from spmdrl.roles.generation import Rollout as Rollout
    from spmdrl.roles.generation_rows import Generation as Generation
    from spmdrl.roles.handles import (
        Policy as Policy,
        Reference as Reference,
        Reward as Reward,
        Value as Value,
    )
    from spmdrl.roles.model_calls import (
        Update as Update,
        UpdateRecords as UpdateRecords,
    )
    from spmdrl.roles.turn_calls import TURN_REWARDS as TURN_REWARDS
    from spmdrl.rollout.protocol import (
        OWN as OWN,
        Completion as Completion,
        Finish as Finish,
        Request as Request,
        RolloutEngine as RolloutEngine,
        SamplingParams as SamplingParams,
    )
    from spmdrl.run.protocols import (
        Environment as Environment,
        Evaluates as Evaluates,
        Metrics as Metrics,
        Trainer as Trainer,
    )
    from spmdrl.run.run import Run as Run
    from spmdrl.run.step_report import (
        joined as joined,
        update_metrics as update_metrics,
    )
    from spmdrl.training.options import TrainOptions as TrainOptions
    from spmdrl.training.protocol import (
        LossFn as LossFn,
        LossInput as LossInput,
        OptimStep as OptimStep,
        TrainBackend as TrainBackend,
    )
    from spmdrl.planning.systems.protocol import (
        Traffic as Traffic,
        TrainSystem as TrainSystem,
    )
    from spmdrl.planning.systems.train_memory import (
        TrainMemory as TrainMemory,
        plain_memory as plain_memory,
    )
    from spmdrl.role_spec import RoleSpec as RoleSpec
    from spmdrl.training.readout import (
        Readout as Readout,
        SCORES as SCORES,
        VALUES as VALUES,
        next_token as next_token,
    )
    from spmdrl.training.torch_backend import TorchBackend as TorchBackend
    from spmdrl.turns.environment import (
        Observation as Observation,
        TurnEnvironment as TurnEnvironment,
    )
    from spmdrl.turns.tool_calls import (
        ToolCall as ToolCall,
        ToolCalls as ToolCalls,
    )

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "algorithms.advantages": (
            "broadcast_to_tokens group_advantages leave_one_out rewards_to_go whiten"
        ),
        "algorithms.direct_preference": (
            "as_compared implicit_rewards kto_baseline ordered_pairs preference_loss "
            "response_sums distinct_responses pair_rows"
        ),
        "algorithms.kl": "kl AdaptiveKl FixedKl KlControl sequence_kl",
        "algorithms.policy_loss": "POLICY_COLUMNS clipped_policy_loss loss_shares loss_weights",
        "algorithms.reward_shaping": (
            "RewardScaler missing_eos_penalty scale_and_clip token_rewards"
        ),
        "algorithms.rewards": "has_signal kl_in_reward overlong_penalty",
        "algorithms.supervised": "bradley_terry_loss next_token_loss",
        "algorithms.turn_credit": "turn_advantages turn_returns turn_tokens",
        "algorithms.value_loss": "gae VALUE_COLUMNS clipped_value_loss explained_variance",
        "batch": "Batch concat from_rows group_index",
        "config.algorithms": "AlgorithmSection PreferenceSection",
        "config.data_sets": "response_tokens",
        "config.sections": "Config",
        "data.conversations": "Conversation",
        "data.item_set": "DataItem ItemSet items_of",
        "data.order": "DataSet StepRows home_rows",
        "data.preferences": "Pair mismatched",
        "distributed.row_bytes": "Column",
        "distributed.reduce": (
            "Moments broadcast_object gather_objects gather_tables moments world_any world_max "
            "world_sum"
        ),
        "evaluation.metrics": "clustered_mean CHOSEN pair_accuracy",
        "flows.advantage_terms": "pays_turns puts_kl_in_reward token_advantages",
        "flows.dpo": "DpoTrainer",
        "flows.environment": "GroupEnvironment",
        "flows.grpo": "GrpoTrainer",
        "flows.held_out_preferences": "HeldOutPreferences log_ratio",
        "flows.online_dpo": "OnlineDpoTrainer",
        "flows.pair_verdicts": "judged_rows",
        "flows.policy_terms": "policy_columns policy_loss update_of with_loss_weights",
        "flows.ppo": "PpoTrainer",
        "flows.ppo_rewards": "PpoRewards",
        "flows.preference_terms": (
            "BASELINE REFERENCE pair_loss pair_metrics pair_update with_pair_shares"
        ),
        "flows.reference_sums": "AskedSums CachedSums ReferenceSums distinct_rows",
        "flows.reward_model": "RewardModelTrainer",
        "flows.sft": "SftTrainer",
        "models.family": "Body Family",
        "models.family_parts": (
            "alike dense_mlp heads_of layer_kinds norm_of num_experts_of plain_attention rope_of "
            "ropes_of windows_of"
        ),
        "models.fields": "Fields",
        "models.files.hf": "open_model",
        "models.files.peft": "open_adapter read_adapter",
        "models.local_shards": "LocalTensors",
        "models.specs": (
            "AttentionOptions ClampedSwiglu DenseMlp GatedDelta LatentAttention LayerSpec MoeMlp "
            "NormSpec SharedExperts SoftmaxAttention"
        ),
        "observe.names": "ACCURACY EVAL STANDARD_ERROR",
        "observe.trackers.protocol": "TrackedRun Tracker",
        "roles.calls": "Call together",
        "roles.custom": "CustomRole RoleContext UserRole",
        "roles.generation": "Rollout",
        "roles.generation_rows": "Generation",
        "roles.handles": "Policy Reference Reward Value",
        "roles.model_calls": "Update UpdateRecords",
        "roles.turn_calls": "TURN_REWARDS",
        "rollout.protocol": "OWN Completion Finish Request RolloutEngine SamplingParams",
        "run.protocols": "Environment Evaluates Metrics Trainer",
        "run.run": "Run",
        "run.step_report": "joined update_metrics",
        "training.options": "TrainOptions",
        "planning.systems.protocol": "Traffic TrainSystem",
        "planning.systems.train_memory": "TrainMemory plain_memory",
        "role_spec": "RoleSpec",
        "training.protocol": "LossFn LossInput OptimStep TrainBackend",
        "training.readout": "Readout SCORES VALUES next_token",
        "training.torch_backend": "TorchBackend",
        "turns.environment": "Observation TurnEnvironment",
        "turns.tool_calls": "ToolCall ToolCalls",
    }
)
"""Module -> its names in this one."""

_PLACES = places(_NAMES)

__all__ = sorted(_PLACES)

if not TYPE_CHECKING:  # a type checker knows the names from the imports above, and no others
    __getattr__ = getter(__name__, _PLACES)

    def __dir__() -> list[str]:
        return __all__
