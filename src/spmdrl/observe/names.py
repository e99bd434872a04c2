"""Names of the metrics that the console and the report know; others are stored and plotted too.

A record of metrics.jsonl is flat: these names, `step`, `wall_time`, and the metrics a flow adds.
"""

from __future__ import annotations

from collections.abc import Mapping

REWARD = "reward"  # mean over responses
LENGTH = "response_length"  # mean, in tokens
KL = "kl"  # KL of the policy's move within the step, nats per token
REF_KL = "ref_kl"  # KL to the reference, nats per token
ENTROPY = "entropy"  # nats per token
CLIP_FRACTION = "clip_fraction"
PEAK_MEMORY = "memory/peak_gb"  # 1e9 bytes, the largest of all ranks
PEAK_SUM = "memory/peak_sum_gb"  # 1e9 bytes, the sum of all ranks' largest ones so far

SECONDS = "seconds/"  # + phase
STEP_SECONDS = "seconds/step"
TOKENS_PER_S = "tokens_per_s/"  # + phase, over all ranks
IDLE = "idle/"  # + phase: mean share of its seconds that ranks wait in collectives
TOKENS_PER_RANK = "efficiency/tokens_per_s"  # prompts' and responses', per rank
TFLOPS = "efficiency/tflops/"  # + phase, or step: 1e12 operations per second and rank
MFU = "efficiency/mfu"  # share of the machine's peak
ROLLOUT = "rollout"  # the phase whose tokens/s are the rollout's
UPDATE = "update"  # the phase whose tokens/s are the training's
OTHER = "other"  # the time of a step outside all phases

EVAL = "eval/"  # + name of the set + one of the following
ACCURACY = "/accuracy"  # in [0, 1]
WIN_RATE = "/win_rate"  # against the opponent's responses, a tie counts half
STANDARD_ERROR = "/standard_error"


def phases(record: Mapping[str, float]) -> list[str]:
    """The phases whose seconds a record holds, in its order, with `other` last."""
    names = [n.removeprefix(SECONDS) for n in record if n.startswith(SECONDS) and n != STEP_SECONDS]
    return [name for name in names if name != OTHER] + [OTHER] * (OTHER in names)
