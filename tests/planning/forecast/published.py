"""Published step times of reinforcement learning, and the configurations that stand for them.

A row has the layout, batch and lengths that its source gives. What a source leaves open is written
into the row's `assumed`. No rate or share was chosen by looking at a prediction; the placement of
OpenRLHF's rows was taken from that project's script after a first one had missed by up to 5 times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forecast_cases import config_of, machine_of
from spmdrl.config.sections import Config
from spmdrl.planning.forecast.forecast import forecast_step
from spmdrl.planning.forecast.step import Lengths, StepForecast
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.known_models import known_model

SAME = {"ranks": "same as policy"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published step time.

    Args:
        seconds: seconds of a step as published, or None where `tokens_per_s` is.
        tokens_per_s: prompts' and responses' tokens per second of all GPUs together.
        assumed: settings that the source does not give.
        fits: whether this project would run it on these GPUs as it is.
    """

    name: str
    source: str
    gpu: str
    nodes: int
    model: str
    lengths: Lengths
    config: Config
    seconds: float | None = None
    tokens_per_s: float | None = None
    assumed: str = ""
    fits: bool = True
    phases: Mapping[str, float] = field(default_factory=dict)

    def predict(self) -> StepForecast:
        model = known_model(self.model)
        machine = machine_of(self.gpu, nodes=self.nodes)
        plan = plan_from_shapes(
            self.config,
            machine.num_ranks,
            8,
            device_type="cuda",
            device_bytes=machine.device.memory_bytes * (1 if self.fits else 10),
            refuses=False,
            models=dict.fromkeys(self.config.roles, model),
        )
        return forecast_step(self.config, plan, machine, self.lengths)

    def measured(self, found: StepForecast) -> float:
        """Seconds as published, of a step of as many tokens."""
        if self.seconds is not None:
            return self.seconds
        assert self.tokens_per_s is not None, self.name
        return found.tokens / self.tokens_per_s


def nemo(
    model: str,
    *,
    nodes: int,
    seconds: float,
    prompt: float,
    response: float,
    generation_tp: int,
    train: Mapping[str, Any],
    recompute: str = "none",
    ahead: int = 0,
    version: str = "v0.4",
    fits: bool = True,
) -> Published:
    """A row of NeMo RL's performance summary: GRPO with 64 x 32 samples and four optimizer steps,
    packed to 4,096 tokens, Megatron and vLLM, with a reference.

    Args:
        ahead: nodes for generation one step ahead; 0: all roles share all GPUs.
    """
    where = {"ranks": f"nodes 0-{nodes - ahead - 1}"} if ahead else {}
    away = {"ranks": f"nodes {nodes - ahead}-{nodes - 1}"} if ahead else SAME
    config = config_of(
        "grpo",
        {
            "policy": {**where, **train},
            "reference": {**SAME, **train},
            "rollout": {**away, "tp": generation_tp},
        },
        lag=1 if ahead else 0,
        data={
            "train": {"source": "none.jsonl", "max_tokens": 512},
            "prompts_per_step": 64,
            "group_size": 32,
        },
        rewards=[{"function": "math"}],
        algorithm={"kl_coef": 0.01},
        sampling={"max_tokens": 3584},
        rollout={"kv_cache_gb": 40.0 if ahead else 30.0, "max_running": 1024},
        train={
            "backend": "megatron",
            "num_minibatches": 4,
            "microbatch_tokens": 4096,
            "share_prompts": False,
            "recompute": recompute,
        },
    )
    how = "one step ahead" if ahead else "on policy"
    return Published(
        name=f"{model}, GRPO, {8 * nodes} H100, {how}",
        source=f"NeMo RL {version}",
        gpu="h100",
        nodes=nodes,
        model=model,
        lengths=Lengths(prompt=prompt, response=response, longest=4096 - prompt),
        config=config,
        seconds=seconds,
        fits=fits,
    )


def ppo_roles(train: Mapping[str, Any], rollout: Mapping[str, Any]) -> dict[str, Any]:
    own = {**SAME, **train}
    roles = {"policy": dict(train), "reference": own, "reward": own, "value": own}
    return {**roles, "rollout": {**SAME, **rollout}}


def ppo(
    roles: Mapping[str, Any],
    *,
    prompts: int,
    microbatch_tokens: int = 8192,
    cache_gb: float = 30.0,
) -> Config:
    """PPO with prompts and responses of 1,024 tokens, one epoch and eight optimizer steps."""
    return config_of(
        "ppo",
        roles,
        data={
            "train": {"source": "none.jsonl", "max_tokens": 1024},
            "prompts_per_step": prompts,
            "group_size": 1,
        },
        rewards=[{"role": "reward"}],
        algorithm={"kl_coef": 0.05},
        sampling={"max_tokens": 1024},
        rollout={"kv_cache_gb": cache_gb},
        train={
            "num_minibatches": 8,
            "microbatch_tokens": microbatch_tokens,
            "recompute": "layer",
        },
    )


FULL = Lengths(prompt=1024, response=1024, longest=1024)


def open_rlhf(model: str, *, gpus: int, seconds: float, cache_gb: float) -> Published:
    """A row of OpenRLHF's old README: 1,024 prompts, one epoch of PPO, in the proportions of its
    script for 70B: an eighth of the GPUs for reference and reward each, a quarter for critic,
    actor and engines of two GPUs each, a row per microbatch.

    Args:
        cache_gb: what vLLM's 90 % of a GPU leave to keys and values.
    """
    part = gpus // 8

    def on(first: int, parts: int) -> dict[str, Any]:
        return {"ranks": f"{first * part}-{(first + parts) * part - 1}", "dp_shard": "all"}

    roles = {
        "policy": on(0, 2),
        "value": on(2, 2),
        "rollout": on(4, 2) | {"tp": 2},
        "reference": on(6, 1),
        "reward": on(7, 1),
    }
    return Published(
        name=f"{model}, PPO, {gpus} A800",
        source="OpenRLHF README of 2024",
        gpu="a800",
        nodes=gpus // 8,
        model=model,
        lengths=FULL,
        config=ppo(roles, prompts=1024, microbatch_tokens=2048, cache_gb=cache_gb),
        seconds=seconds,
        fits=False,
        assumed="prompts and responses of 1,024 tokens and placement as in its script for 70B; its "
        "optimizer steps in host memory are not counted",
    )


def chat_learn(model: str, *, gpus: int, tokens_per_s: float, tp: int) -> Published:
    """A bar of ChatLearn's chart: PPO with a policy and a reward model of one size."""
    return Published(
        name=f"{model} + {model}, PPO, {gpus} A800",
        source="ChatLearn README",
        gpu="a800",
        nodes=gpus // 8,
        model=model,
        lengths=FULL,
        config=ppo(ppo_roles({"dp_shard": "all"}, {"tp": tp}), prompts=1024),
        tokens_per_s=tokens_per_s,
        assumed="A800 (its 2023 README), 1,024 prompts and responses of 1,024 tokens",
    )


MEGATRON_8B = {"dp_shard": "all", "pp": 2}
MEGATRON_30B = {"dp_shard": "all", "tp": 2, "ep": 8, "megatron": {"sp": True}}
MEGATRON_32B = {"dp_shard": "all", "tp": 4, "pp": 4, "megatron": {"sp": True}}


def vime_8b() -> Published:
    """A row whose rollout only is published: 82 to 130 s, 672 to 1,138 tokens per second and GPU,
    so about 5,600 tokens a response.
    """
    config = config_of(
        "grpo",
        {"policy": {"tp": 4, "cp": 2}, "rollout": {**SAME, "tp": 4}},
        data={
            "train": {"source": "none.jsonl", "max_tokens": 1024},
            "prompts_per_step": 8,
            "group_size": 16,
        },
        rewards=[{"function": "math"}],
        sampling={"max_tokens": 7168},
        rollout={"kv_cache_gb": 30.0},
        train={"microbatch_tokens": 16384, "recompute": "layer"},
    )
    return Published(
        name="qwen3-8b, GRPO, 8 H100",
        source="RL-Align/RL-Kernel#377",
        gpu="h100",
        nodes=1,
        model="qwen3-8b",
        lengths=Lengths(prompt=150, response=5600, longest=7168),
        config=config,
        phases={"rollout": 106.0},
        assumed="engines of four GPUs",
    )


def rows() -> list[Published]:
    """The rows that are held against predictions, those that take longest to plan last."""
    return [
        nemo(
            "llama-3.1-8b",
            nodes=2,
            seconds=92.8,
            prompt=127,
            response=1019,
            generation_tp=1,
            train=MEGATRON_8B,
            recompute="layer",
            version="v0.5",
        ),
        nemo(
            "llama-3.1-8b",
            nodes=2,
            seconds=74.6,
            prompt=127,
            response=1129,
            generation_tp=1,
            train=MEGATRON_8B,
            recompute="layer",
            ahead=1,
        ),
        nemo(
            "qwen3-30b-a3b",
            nodes=4,
            seconds=225,
            prompt=98,
            response=3154,
            generation_tp=4,
            train=MEGATRON_30B,
            fits=False,
        ),
        nemo(
            "qwen3-32b",
            nodes=4,
            seconds=393,
            prompt=110,
            response=3206,
            generation_tp=4,
            train=MEGATRON_32B,
        ),
        nemo(
            "qwen3-32b",
            nodes=8,
            seconds=215,
            prompt=110,
            response=3207,
            generation_tp=4,
            train=MEGATRON_32B,
            ahead=4,
        ),
        open_rlhf("llama-2-7b", gpus=16, seconds=471.11, cache_gb=65),
        open_rlhf("llama-2-13b", gpus=32, seconds=608.93, cache_gb=59),
        open_rlhf("codellama-34b", gpus=32, seconds=1526.4, cache_gb=38),
        open_rlhf("llama-2-70b", gpus=32, seconds=4488.53, cache_gb=3),
        chat_learn("llama-2-7b", gpus=8, tokens_per_s=6700, tp=1),
        chat_learn("llama-2-70b", gpus=32, tokens_per_s=2600, tp=8),
    ]
