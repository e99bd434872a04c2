"""DeepSpeed's configuration for a role, from ours and a user's own JSON.

Keys of the JSON that the run decides may be there if they say the same, or "auto" as in
transformers' JSONs. All other keys are passed on, so that buckets, overlap and logs can be set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spmdrl.training.deepspeed.options import DeepspeedOptions
from spmdrl.training.options import TrainOptions

BUCKET = 1 << 26
"""Most values that are reduced at once: DeepSpeed allocates a buffer of this size in every backward
pass, by default 2 GB in float32.
"""

_ALL = 1 << 50
"""A number of values that no model has."""

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class _Decided:
    """Args:
    value: what the run decides; None: a user's value is refused whatever it is.
    by: the key that decides it, or the reason.
    """

    value: Any
    by: str


_REFUSED: Mapping[str, str] = {
    "train_batch_size": "the rows of a step and train.num_minibatches decide",
    "train_micro_batch_size_per_gpu": "train.microbatch_tokens decides",
    "gradient_accumulation_steps": "train.microbatch_tokens decides",
    "managed_gradient_accumulation": "the run says which microbatch is the last of its step",
    "scheduler": "train.schedule and train.warmup_steps decide",
    "gradient_predivide_factor": "gradients are summed, and losses divided by the global count",
    "prescale_gradients": "gradients are summed, and losses divided by the global count",
    "gradient_allreduce_op": "gradients are summed, and losses divided by the global count",
    "seq_parallel_communication_data_type": "gradients are summed in float32",
    "fp16": "there is no float16: model.dtype decides",
    "amp": "there is no apex: model.dtype decides",
    "torch_autocast": "model.dtype decides",
    "sparse_gradients": "gradients are dense",
    "activation_checkpointing": "train.recompute decides",
    "pipeline": "there is no pp",
    "tensor_parallel": "roles.NAME.tp decides",
    "sequence_parallel_size": "roles.NAME.cp decides",
    "data_parallel_size": "roles.NAME.dp_replicate and dp_shard decide",
    "expert_parallel": "experts are not divided",
    "use_data_before_expert_parallelism": "experts are not divided",
    "hybrid_engine": "rollout.engine generates",
    "compile": "the backend reads what DeepSpeed's compiler replaces",
    "checkpoint": "checkpoint.* decides",
    "load_universal_checkpoint": "checkpoint.* decides",
    "data_efficiency": "data.* decides",
    "curriculum_learning": "data.* decides",
    "dataloader_drop_last": "data.* decides",
    "compression_training": "weights are not compressed",
    "weight_quantization": "weights are not quantised",
    "quantize_training": "weights are not quantised",
    "progressive_layer_drop": "all layers are computed",
    "elasticity": "the run's ranks do not change",
    "autotuning": "spmdrl suggest looks for settings",
    "data_types.param_dtype": "model.dtype decides",
    "data_types.buffer_dtype": "model.dtype decides",
    "data_types.keep_in_fp32_modules": "model.dtype decides",
    "bf16.bf16_master_weights_and_grads": "masters and gradient sums are float32",
    "bf16.bf16_optimizer_states": "moments are float32",
    "bf16.immediate_grad_update": "the backend holds the buffers of the sums",
    "zero_optimization.offload_optimizer": "train.deepspeed.offload decides",
    "zero_optimization.offload_param": "train.deepspeed.offload decides",
    "zero_optimization.cpu_offload": "train.deepspeed.offload decides",
    "zero_optimization.cpu_offload_param": "train.deepspeed.offload decides",
    "zero_optimization.cpu_offload_use_pin_memory": "train.deepspeed.offload decides",
    "zero_optimization.round_robin_gradients": "layouts know one order of parameters",
    "zero_optimization.parameter_alignment": "layouts know no padding between parameters",
    "zero_optimization.sub_group_size": "layouts know one part for each of AdamW's groups",
    "zero_optimization.stage3_param_persistence_threshold": "layouts know every weight divided",
    "zero_optimization.memory_efficient_linear": "it would replace torch's layers in all roles",
    "zero_optimization.zero_hpz_partition_size": "its groups are made by the whole world",
    "zero_optimization.zero_quantized_weights": "weights are not quantised",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights are not quantised",
    "zero_optimization.zero_quantized_gradients": "gradients are summed in float32",
    "zero_optimization.zenflow": "train.deepspeed.offload decides",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.elastic_checkpoint": "checkpoint.* decides",
    "zero_optimization.compute_grad_norm": "the backend computes the norm",
}
"""Keys that a user's JSON may not set, except to "auto", null or off, and why."""


def engine_settings(
    train: TrainOptions, options: DeepspeedOptions, num_values: int, user: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration of a role's engine.

    Losses are already divided by the global count, so gradients are summed, not averaged, over
    ranks as over microbatches; this backend clips (see `FlatParts`), and sets the learning rate.

    Args:
        num_values: number of values that are trained.
        user: content of a user's JSON, which `check_user` has accepted.
    """
    is_narrow = train.param_dtype == torch.bfloat16
    zero: dict[str, Any] = {
        "reduce_bucket_size": max(1, min(BUCKET, num_values)),
        **_free(user.get("zero_optimization", {}), "zero_optimization."),
        "stage": options.stage,
    }
    if options.stage == 3:
        zero |= {
            # each weight is divided, in one part for each of AdamW's groups
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": _ALL,
            # it would replace torch's linear layers, those of other roles too
            "memory_efficient_linear": False,
        }
    # The ZeRO 1 of bfloat16 and the one that offloads cannot leave out their own norm.
    if options.stage < 3 and options.offload == "none" and not (options.stage == 1 and is_narrow):
        zero["compute_grad_norm"] = False
    if options.offload != "none":
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = host
        if options.offload == "all":
            zero["offload_param"] = host
    return {
        **_free(user, ""),
        # of no effect, but they must be given: microbatches are packed by tokens
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if options.stage == 3 else "sum",
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": is_narrow, "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        # its AdamW for CPUs would be compiled when it is first used
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def read_user(role: str, path: str | None) -> dict[str, Any]:
    """Read a user's DeepSpeed JSON; empty without one.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    if path is None:
        return {}
    key = f"roles.{role}: train.deepspeed.config={path}"
    if not Path(path).is_file():
        raise ValueError(f"{key}: there is no such file")
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{key} holds no JSON object")
    return found


def check_user(
    role: str, train: TrainOptions, options: DeepspeedOptions, user: Mapping[str, Any]
) -> None:
    """Refuse a user's DeepSpeed JSON that contradicts what the run decides.

    Raises:
        ValueError: all keys that do are named, with their values and what decides them.
    """
    decided = _decided(train, options)
    wrong = [
        f"{key}={json.dumps(value)}: {reason}"
        for key, value in _leaves(user, "", {*decided, *_REFUSED})
        if (reason := _contradiction(key, value, decided)) is not None
    ]
    if wrong:
        raise ValueError(
            f"roles.{role}: train.deepspeed.config={options.config} sets what the run decides; "
            f'take out, or set to "auto": {"; ".join(wrong)}'
        )


def _decided(train: TrainOptions, options: DeepspeedOptions) -> dict[str, _Decided]:
    """Return the keys for which a user's JSON may say what the run has decided."""
    found = {
        "zero_optimization.stage": (options.stage, "train.deepspeed.stage"),
        "gradient_clipping": (train.clip_norm, "train.clip_norm"),
        "bf16.enabled": (train.param_dtype == torch.bfloat16, "model.dtype"),
        "bf16.check_grad_overflow": (False, "a gradient that is not finite is always skipped"),
        "data_types.grad_accum_dtype": ("fp32", "gradients are summed in float32"),
        "communication_data_type": ("fp32", "gradients are summed in float32"),
        "zero_allow_untested_optimizer": (True, "torch's AdamW is used"),
        "zero_force_ds_cpu_optimizer": (False, "torch's AdamW is used"),
        "optimizer.type": ("AdamW", "torch's AdamW is used"),
        "optimizer.params.lr": (train.lr, "train.lr"),
        "optimizer.params.betas": (list(train.betas), "train.betas"),
        "optimizer.params.eps": (train.eps, "train.eps"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
        "optimizer.params.torch_adam": (True, "torch's AdamW is used"),
        "optimizer.params.adam_w_mode": (True, "torch's AdamW is used"),
    }
    return {key: _Decided(value=value, by=by) for key, (value, by) in found.items()}


def _contradiction(key: str, value: Any, decided: Mapping[str, _Decided]) -> str | None:
    """Say what a user's value contradicts, if it does."""
    if value == AUTO:
        return None
    if key in decided:
        own = decided[key]
        return None if value == own.value else f"it is {json.dumps(own.value)} ({own.by})"
    if key.startswith("optimizer."):
        return "torch's AdamW has no such option here"
    reason = _REFUSED.get(key)
    return None if reason is None or _is_off(value) else reason


def _is_off(value: Any) -> bool:
    """Whether a setting of this value is as good as none."""
    if isinstance(value, Mapping):
        is_none = str(value.get("device", "")).lower() == "none"
        return not value or is_none or value.get("enabled", True) is False
    return value is None or value is False


def _leaves(values: Mapping[str, Any], prefix: str, known: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a JSON object, down to those that are known or hold no object."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _leaves(value, f"{key}.", known)
        else:
            yield key, value


def _free(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings that are the user's: those under no key that the run sets."""
    taken = {"optimizer", "bf16", "data_types", "gradient_clipping", "communication_data_type"}
    return {
        name: value
        for name, value in values.items()
        if value != AUTO and f"{prefix}{name}" not in {*_REFUSED, *taken, "zero_optimization"}
    }
