"""What verl, OpenRLHF and TRL compute of fixed inputs, for `tests/algorithms/upstream.json`.

    pip download --no-deps verl==0.9.1 openrlhf==0.11.2 -d DIR    # and unpack both with unzip
    python scripts/dev/upstream_numbers.py --verl DIR/verl --openrlhf DIR/openrlhf OUT.json

Of verl and OpenRLHF only the functions named here are run, taken out of their files one by one, so
that nothing else of them (ray, deepspeed) has to be installed. TRL is imported as it is installed.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CAP, CLIP_LOW, CLIP_HIGH, DUAL, BUDGET = 1.2, 0.2, 0.28, 1.5, 8
GAMMA, LAMBDA, VALUE_CLIP, BETA, SMOOTHING = 0.97, 0.9, 0.2, 0.3, 0.1
CISPO_HIGH, GSPO = 0.15, (0.03, 0.04)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verl", type=Path, required=True, help="the unpacked wheel")
    parser.add_argument("--openrlhf", type=Path, required=True, help="the unpacked wheel")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    inputs = make_inputs()
    found = {
        "settings": {
            "cap": CAP,
            "clip": [CLIP_LOW, CLIP_HIGH],
            "dual": DUAL,
            "budget": BUDGET,
            "gamma": GAMMA,
            "lambda": LAMBDA,
            "value_clip": VALUE_CLIP,
            "beta": BETA,
            "smoothing": SMOOTHING,
            "cispo_high": CISPO_HIGH,
            "gspo": GSPO,
        },
        "inputs": inputs,
        "verl": {"version": wheel_version(given.verl), **verl(given.verl, inputs)},
        "openrlhf": {"version": wheel_version(given.openrlhf), **openrlhf(given.openrlhf, inputs)},
        "trl": {"version": version("trl"), **trl(inputs)},
    }
    given.out.write_text(json.dumps(found, default=as_list, indent=1) + "\n")


def make_inputs() -> dict[str, Tensor]:
    """Padded [B, T] columns of three groups of two responses, float64; in `mask_empty` a response
    is masked as a whole.
    """
    generator = torch.Generator().manual_seed(5)
    lengths, size = torch.tensor([6, 3, 1, 4, 5, 2]), (6, 6)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    mask = (torch.arange(6)[None] < lengths[:, None]).double()
    logprobs = -2 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.05
    empty = mask.clone()
    empty[3] = 0
    return {
        "mask": mask,
        "mask_empty": empty,
        "logprobs": logprobs,
        "old": logprobs + noise(0.4),
        "reference": logprobs + noise(0.6),
        "rollout": logprobs + noise(0.4),
        "advantages": noise(1.0),
        "row_advantages": noise(1.0)[:, 0],
        "values": noise(1.0),
        "old_values": noise(1.0),
        "returns": noise(1.0),
        "token_rewards": noise(1.0) * mask,
        "rewards": noise(1.0)[:, 0],
        "groups": torch.tensor([0, 0, 0, 1, 1, 1]),
        "policy_sums": noise(3.0)[:4, 0] - 8,
        "reference_sums": noise(3.0)[:4, 0] - 8,
        "scores": noise(1.0)[:4, 0],
        "margin": torch.tensor([0.3, 0.0], dtype=torch.float64),
    }


def with_gradient(column: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The loss of a column, and its gradient."""
    leaf = column.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return {"loss": value.item(), "gradient": gradient}


def verl(root: Path, x: dict[str, Tensor]) -> dict[str, Any]:
    helpers = ("masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value")
    functional = taken(root / "verl/utils/torch_functional.py", helpers, {})

    class ActorConfig(SimpleNamespace):
        def get(self, name: str, default: Any) -> Any:
            return getattr(self, name, default)

    losses = (
        "compute_policy_loss_vanilla",
        "compute_policy_loss_gspo",
        "compute_policy_loss_cispo",
    )
    estimators = (
        *("compute_gae_advantage_return", "compute_grpo_outcome_advantage"),
        *("compute_rloo_outcome_advantage", "compute_reinforce_plus_plus_outcome_advantage"),
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
    )
    more = ("agg_loss", "compute_value_loss", "kl_penalty", "kl_penalty_forward")
    scope = {
        "verl_F": SimpleNamespace(**functional),
        "ActorConfig": ActorConfig,
        "AlgoConfig": type("AlgoConfig", (), {}),
    }
    f = SimpleNamespace(
        **taken(root / "verl/trainer/ppo/core_algos.py", (*losses, *estimators, *more), scope)
    )
    info = {"loss_scale_factor": BUDGET}

    def config(**changes: Any) -> Any:
        plain = {"clip_ratio": 0.2, "clip_ratio_low": CLIP_LOW, "clip_ratio_high": CLIP_HIGH}
        return ActorConfig(**{**plain, "clip_ratio_c": 1e9, "global_batch_info": info, **changes})

    def policy(function: Any, mode: str, mask: Tensor, per_row: bool = False, **more: Any) -> Any:
        weights = more.pop("weights", None)
        advantages = x["row_advantages"][:, None].expand(6, 6) if per_row else x["advantages"]
        return with_gradient(
            x["logprobs"],
            lambda own: function(
                x["old"], own, advantages, mask, mode, config(**more), rollout_is_weights=weights
            )[0],
        )

    vanilla, mask, empty = f.compute_policy_loss_vanilla, x["mask"], x["mask_empty"]
    modes = {
        "token_mean": "token-mean",
        "sequence_mean": "seq-mean-token-mean",
        "fixed_length": "seq-mean-token-sum-norm",
    }
    weights = (x["old"] - x["rollout"]).exp().clamp(max=CAP)
    gspo = {"clip_ratio_low": GSPO[0], "clip_ratio_high": GSPO[1]}
    cispo = {"clip_ratio_low": 1.0, "clip_ratio_high": CISPO_HIGH}
    kinds = {"k1": "k1+", "k2": "k2", "k3": "k3"}  # the first with the gradient of the divergence

    def kl_of(kind: str) -> dict[str, Any]:
        return with_gradient(
            x["logprobs"], lambda own: (f.kl_penalty(own, x["reference"], kind) * mask).sum()
        )

    index = x["groups"].numpy()
    at_end = torch.zeros_like(mask)
    at_end[:, 0] = x["rewards"]
    gae, returns = f.compute_gae_advantage_return(
        x["token_rewards"], x["old_values"], mask, GAMMA, LAMBDA
    )
    algorithm = SimpleNamespace(gamma=1.0)
    return {
        "policy": {
            **{f"ppo {n}": policy(vanilla, m, mask) for n, m in modes.items()},
            **{f"ppo {n} empty": policy(vanilla, m, empty) for n, m in modes.items()},
            "dual": policy(vanilla, "token-mean", mask, clip_ratio_c=DUAL),
            "capped": policy(vanilla, "token-mean", mask, weights=weights),
            "gspo": policy(f.compute_policy_loss_gspo, modes["sequence_mean"], mask, True, **gspo),
            "cispo": policy(f.compute_policy_loss_cispo, "token-mean", mask, **cispo),
        },
        "kl": {name: kl_of(kind) for name, kind in kinds.items()},
        "value": with_gradient(
            x["values"],
            lambda own: f.compute_value_loss(own, x["returns"], x["old_values"], mask, VALUE_CLIP)[
                0
            ],
        ),
        "advantages": {
            "gae": gae * mask,
            "returns": returns * mask,
            "grpo": f.compute_grpo_outcome_advantage(at_end.clone(), mask, index)[0],
            "dr_grpo": f.compute_grpo_outcome_advantage(
                at_end.clone(), mask, index, norm_adv_by_std_in_grpo=False
            )[0],
            "rloo": f.compute_rloo_outcome_advantage(at_end.clone(), mask, index)[0],
            "reinforce_pp": f.compute_reinforce_plus_plus_outcome_advantage(
                x["token_rewards"], mask, algorithm
            )[0],
            "reinforce_pp_baseline": (
                f.compute_reinforce_plus_plus_baseline_outcome_advantage(
                    at_end.clone(), mask, index
                )[0]
            ),
        },
    }


def openrlhf(root: Path, x: dict[str, Tensor]) -> dict[str, Any]:
    (package,) = root.glob("*.data/purelib/openrlhf")
    utils = taken(
        package / "models/utils.py", ("KL_IS_WEIGHT_CLIP", "compute_approx_kl", "masked_mean"), {}
    )
    names = ("aggregate_loss", "SFTLoss", "PolicyLoss", "ValueLoss", "PairWiseLoss", "DPOLoss")
    f = SimpleNamespace(**taken(package / "models/loss.py", names, utils))
    maker = package / "trainer/ppo_utils/experience_maker.py"
    methods = ("get_advantages_and_returns", "get_cumulative_returns")
    made = SimpleNamespace(**taken(maker, methods, {}))
    control = taken(package / "trainer/ppo_utils/kl_controller.py", ("AdaptiveKLController",), {})
    mask, empty = x["mask"], x["mask_empty"]
    clip = {"clip_eps_low": CLIP_LOW, "clip_eps_high": CLIP_HIGH}

    def policy(mask: Tensor, per_row: bool = False, **more: Any) -> dict[str, Any]:
        loss = f.PolicyLoss(**{**clip, **more})
        advantages = x["row_advantages"][:, None].expand(6, 6) if per_row else x["advantages"]
        return with_gradient(
            x["logprobs"],
            lambda own: loss(own, x["old"], advantages, mask, rollout_log_probs=x["rollout"])[0],
        )

    capped = {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.0, CAP),
    }
    gspo = {"policy_loss_type": "gspo", "clip_eps_low": GSPO[0], "clip_eps_high": GSPO[1]}
    advantages, returns = made.get_advantages_and_returns(
        None, x["old_values"], x["token_rewards"], mask, GAMMA, LAMBDA
    )

    def pairs(**more: Any) -> dict[str, Any]:
        loss = f.DPOLoss(BETA, **more)
        return with_gradient(
            x["policy_sums"],
            lambda own: loss(own[::2], own[1::2], *(x["reference_sums"][i::2] for i in (0, 1)))[0],
        )

    steered = control["AdaptiveKLController"](0.1, 4.0, 200)
    coefficients = []
    for kl in (3.0, 4.2, 12.0, 0.0):
        steered.update(kl, 16)
        coefficients.append(float(steered.value))
    return {
        "policy": {
            "ppo token_mean": policy(mask),
            "ppo sequence_mean": policy(mask, token_level_loss=False),
            "ppo token_mean empty": policy(empty),
            "ppo sequence_mean empty": policy(empty, token_level_loss=False),
            "dual": policy(mask, dual_clip=DUAL),
            "capped": policy(mask, **capped),
            "gspo": policy(mask, True, **gspo),
        },
        "kl": {
            kind: with_gradient(
                x["logprobs"],
                lambda own, kind=kind: (
                    f_kl(utils, own, x["reference"], kind, kind == "k1") * mask
                ).sum(),
            )
            for kind in ("k1", "k2", "k3")
        },
        "value": with_gradient(
            x["values"],
            lambda own: f.ValueLoss(VALUE_CLIP)(own, x["old_values"], x["returns"], mask),
        ),
        "sft": with_gradient(x["logprobs"], lambda own: f.SFTLoss()(own, mask)),
        "advantages": {
            "unwhitened gae": advantages * mask,
            "returns": returns * mask,
            "rewards to go": made.get_cumulative_returns(None, x["token_rewards"], mask, 1.0)
            * mask,
        },
        "pairs": {
            "dpo": pairs(),
            "cdpo": pairs(label_smoothing=SMOOTHING),
            "ipo": pairs(ipo=True),
        },
        "reward": {
            "plain": with_gradient(x["scores"], lambda own: f.PairWiseLoss()(own[::2], own[1::2])),
            "margin": with_gradient(
                x["scores"], lambda own: f.PairWiseLoss()(own[::2], own[1::2], x["margin"])
            ),
        },
        "adaptive_kl": coefficients,
    }


def f_kl(
    utils: dict[str, Any], own: Tensor, reference: Tensor, kind: str, unbiased: bool
) -> Tensor:
    found: Tensor = utils["compute_approx_kl"](
        own, reference, kl_estimator=kind, unbiased_gradient=unbiased
    )
    return found


def trl(x: dict[str, Tensor]) -> dict[str, Any]:
    from trl import GRPOTrainer, RewardTrainer
    from trl.experimental.orpo import ORPOTrainer

    mask = x["mask"]

    def policy(kind: str, level: str = "token", **more: Any) -> dict[str, Any]:
        """`GRPOTrainer`'s own method on an object that has what it reads."""
        capped, beta = more.pop("capped", False), more.pop("beta", 0.0)
        low, high = more.pop("clip", (CLIP_LOW, CLIP_HIGH))
        per_row = level == "sequence"

        def loss(own: Tensor) -> Tensor:
            trainer = MagicMock()
            trainer.loss_type, trainer.importance_sampling_level = kind, level
            trainer.epsilon_low, trainer.epsilon_high, trainer.beta = low, high, beta
            trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = capped
            trainer.max_completion_length = BUDGET
            trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
            trainer.current_gradient_accumulation_steps = 1
            trainer.args = SimpleNamespace(
                delta=None, use_bias_correction_kl=False, steps_per_generation=1
            )
            trainer.accelerator.num_processes = 1
            trainer.accelerator.gather = trainer.accelerator.reduce = lambda t, **_: t
            trainer._get_per_token_logps_and_entropies.return_value = (own, own.detach(), None)
            inputs = {
                **{name: torch.zeros(6, 1) for name in ("prompt_ids", "prompt_mask")},
                "completion_ids": torch.zeros(6, 6),
                "completion_mask": mask,
                "advantages": x["row_advantages"] if per_row else x["advantages"],
                "old_per_token_logps": x["old"],
                "ref_per_token_logps": x["reference"],
                "num_items_in_batch": mask.sum(),
                "importance_sampling_ratio": (x["old"] - x["rollout"]).exp().clamp(max=CAP),
            }
            found: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
            return found

        return with_gradient(x["logprobs"], loss)

    def odds(own: Tensor) -> Tensor:
        trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
        losses = ORPOTrainer.odds_ratio_loss(trainer, own[::2], own[1::2])[0]
        return -own[::2].mean() - losses.mean()

    def reward(own: Tensor, margin: bool) -> Tensor:
        trainer = MagicMock()
        trainer.args.center_rewards_coefficient = 0.01
        trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda t: t
        inputs = {"attention_mask": mask} | ({"margin": x["margin"]} if margin else {})
        logits = torch.cat((own[::2], own[1::2]))[:, None]
        found: Tensor = RewardTrainer.compute_loss(
            trainer, lambda **_: SimpleNamespace(logits=logits), inputs
        )
        return found

    return {
        "policy": {
            "ppo sequence_mean": policy("grpo"),
            "ppo token_mean": policy("bnpo"),
            "ppo fixed_length": policy("dr_grpo"),
            "dapo": policy("dapo"),
            "kl in loss": policy("dapo", beta=BETA),
            "capped": policy("dapo", capped=True),
            "gspo": policy("grpo", "sequence", clip=GSPO),
            "cispo": policy("cispo", clip=(0.0, 1 + CISPO_HIGH)),
        },
        # of log-probabilities per token
        "pairs": {"orpo": with_gradient(x["policy_sums"] / 10, odds)},
        "reward": {
            "centred": with_gradient(x["scores"], lambda own: reward(own, False)),
            "centred margin": with_gradient(x["scores"], lambda own: reward(own, True)),
        },
    }


def taken(file: Path, names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """Functions, classes, methods and constants of a file, without decorators and annotations."""
    tree = ast.parse(file.read_text())
    found: list[ast.stmt] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            node.decorator_list = []
            found.append(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            found.append(node)
    for node in (inner for outer in found for inner in ast.walk(outer)):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    plain = {"torch": torch, "nn": nn, "F": F, "np": np, "defaultdict": defaultdict}
    typing = {"Optional": Optional, "Tuple": tuple, "Union": Union, "Any": Any}
    space: dict[str, Any] = {**plain, **typing, **scope}
    exec(compile(ast.Module(body=found, type_ignores=[]), str(file), "exec"), space)
    return {name: space[name] for name in names}


def wheel_version(root: Path) -> str:
    (info,) = root.glob("*.dist-info")
    return info.name.removesuffix(".dist-info").rpartition("-")[2]


def as_list(value: Any) -> Any:
    assert isinstance(value, Tensor), value
    return value.detach().tolist()


if __name__ == "__main__":
    main()
