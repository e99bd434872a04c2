"""A line for every key of the configuration: what sets it where it matters, and what shows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Row:
    """Args:
    base: a configuration of `test_key_effects.bases`.
    words: what changes in it; the last one is what is tried.
    shown: by what, each of `plan` (what is derived from the configuration without a run), `refused`
        and `doubt` (a message on loading or planning that names the key), and of a tiny run
        `metrics`, `files` or `error` (a message that names the key or its value); or
        `FILE::TEST`, which sets the key.
    """

    base: str
    shown: tuple[str, ...]
    words: tuple[str, ...]


def row(base: str, shown: str, *words: str) -> Row:
    return Row(base, tuple(shown.split()), words)


def reward(name: str) -> str:
    return f"rewards.0.function={HERE / 'key_rewards.py'}:{name}"


BOTH = "plan metrics"
KL = ("roles.reference={}", "algorithm.kl_coef=0.1")
AIMS = (*KL, "algorithm.kl_target=0.1", "algorithm.kl_horizon=100")
HELD = "evaluation.held_out=4"
DRAWN = (HELD, "evaluation.num_samples=2")
SAVED = ("steps=3", "checkpoint.every=1", "checkpoint.keep_last=1")
BEST = "tests/run/test_best.py::test_the_best_checkpoint_is_kept_and_a_run_ends_that_gets_no_better"
FEW = ("steps=1", "data.prompts_per_step=1")
TEACHER = ("roles.teacher={}", "algorithm.teacher_coef=1")
TURNS = "rollout.turns={kind: my_module:Environment}"
CALL = "tests/turns/test_call.py"
ADAPTED = "roles.policy.adapter={rank: 4}"
AGAIN = "train.epochs=4"
ENDS = ",".join(str(token) for token in range(9, 80))
LETTERS = ",".join("abcdefghijklmnopqrstuvwxyz")

JUDGE = ("roles.judge={judge: {max_tokens: 32}}", "rewards=[{role: judge}]")
RUBRIC = "tests/rewards/test_rubric.py"

ROWS: dict[str, Row] = {
    "flow": row("ppo", BOTH, "flow=grpo"),
    "environment": row("grpo", "error", "environment=nowhere:Environment"),
    "trainer": row("grpo", "error", "trainer=nowhere:Trainer"),
    "seed": row("grpo", "metrics", "seed=4"),
    "steps": row("grpo", BOTH, "steps=1"),
    "run_dir": row("grpo", "error", "run_dir=/dev/null/x"),
    "lag": row("grpo", "metrics", "algorithm.importance_cap=2.0", "lag=1"),
    "fold": row("grpo", "tests/test_placement.py::test_a_fold_is_asked_for"),
    "device": row("grpo", "tests/test_world.py::test_a_device_that_is_not_there_is_refused"),
    "memory_gb": row("grpo", "plan", "memory_gb=0.5"),
    "machine": row("grpo", "error", "machine=nothing"),
    "timeout_s": row(
        "grpo", "tests/test_world.py::test_variables_that_are_left_over_are_named_while_it_waits"
    ),
    "limits": row("grpo", "tests/run/test_endings.py::test_a_hung_rank_is_named_with_its_stack"),
    "model.path": row("grpo", "error", "model.path=nowhere"),
    "model.tiny": row("grpo", BOTH, "model.tiny=true"),
    "model.dtype": row("grpo", BOTH, "model.dtype=bfloat16"),
    "model.cpu_products": row(
        "grpo", "tests/models/test_cpu_products.py::test_a_processor_without_them_is_named"
    ),
    "model.attention": row("grpo", BOTH, "model.attention=sdpa"),
    "roles.NAME.kind": row("grpo", "refused error", "roles.policy.kind=reference"),
    "roles.NAME.model": row("grpo", "error", "roles.policy.model=nowhere"),
    "roles.NAME.head": row("ppo", "metrics", "roles.value.head=normal"),
    "roles.NAME.readout": row("grpo", "refused", "roles.policy.readout=last"),
    "roles.NAME.adapter.path": row(
        "grpo", "refused error", "roles.policy.adapter={}", "roles.policy.adapter.path=nowhere"
    ),
    "roles.NAME.adapter.rank": row("grpo", BOTH, ADAPTED, "roles.policy.adapter.rank=2"),
    "roles.NAME.adapter.alpha": row("grpo", BOTH, ADAPTED, "roles.policy.adapter.alpha=99"),
    "roles.NAME.adapter.targets": row("grpo", BOTH, ADAPTED, "roles.policy.adapter.targets=[mlp]"),
    "roles.NAME.adapter.dropout": row("grpo", BOTH, ADAPTED, "roles.policy.adapter.dropout=0.5"),
    "roles.NAME.adapter.init": row(
        "grpo", "metrics", ADAPTED, "roles.policy.adapter.init=gaussian"
    ),
    "roles.NAME.adapter.rslora": row("grpo", BOTH, ADAPTED, "roles.policy.adapter.rslora=true"),
    "roles.NAME.adapter.experts": row("moe", BOTH, ADAPTED, "roles.policy.adapter.experts=shared"),
    "roles.NAME.base": row(
        "ppo", "plan", ADAPTED, "roles.value.adapter={}", "roles.value.base=policy"
    ),
    "roles.NAME.trained": row("grpo", "refused error", "roles.policy.trained=false"),
    "roles.NAME.train": row("grpo", BOTH, "roles.policy.train={lr: 0.5}"),
    "roles.NAME.freeze": row("grpo", BOTH, "roles.policy.freeze=['*norm*']"),
    "roles.NAME.residency": row("grpo", "plan", "roles.rollout.residency={weights: drop}"),
    "roles.NAME.retokenize": row(
        "grpo", "tests/roles/test_custom_role.py::test_another_tokenizer_is_refused_or_read_as_text"
    ),
    "roles.NAME.judge.template": row(
        "grpo", "plan", *JUDGE, "roles.judge.judge.template='Rate {response}'"
    ),
    "roles.NAME.judge.parse": row("grpo", f"{RUBRIC}::test_a_score_is_read_or_there_is_a_reason"),
    "roles.NAME.judge.pair_template": row(
        "grpo", f"{RUBRIC}::test_texts_that_spell_a_field_stay_as_they_are"
    ),
    "roles.NAME.judge.pair_parse": row("grpo", f"{RUBRIC}::test_a_verdict_is_read"),
    "roles.NAME.judge.system": row(
        "grpo", f"{RUBRIC}::test_a_question_is_one_message_and_its_letters_are_letters"
    ),
    "roles.NAME.judge.chat_template_kwargs": row(
        "grpo", f"{RUBRIC}::test_the_chat_template_is_given_its_variables"
    ),
    "roles.NAME.judge.min": row("grpo", f"{RUBRIC}::test_a_score_is_read_or_there_is_a_reason"),
    "roles.NAME.judge.max": row("grpo", f"{RUBRIC}::test_a_score_is_read_or_there_is_a_reason"),
    "roles.NAME.judge.scale": row("grpo", f"{RUBRIC}::test_scores_are_mapped_to_the_unit_interval"),
    "roles.NAME.judge.failed": row(
        "grpo", "tests/roles/test_judge.py::test_a_judge_gives_the_same_scores_anywhere"
    ),
    "roles.NAME.judge.max_tokens": row("grpo", "plan", *JUDGE, "roles.judge.judge.max_tokens=64"),
    "roles.NAME.judge.temperature": row(
        "grpo", "tests/roles/test_judge.py::test_several_answers_are_drawn_and_have_a_mean"
    ),
    "roles.NAME.judge.num_samples": row(
        "grpo", "tests/roles/test_judge.py::test_several_answers_are_drawn_and_have_a_mean"
    ),
    "roles.NAME.judge.max_prompt_tokens": row(
        "grpo", "plan", *JUDGE, "roles.judge.judge.max_prompt_tokens=99"
    ),
    "roles.NAME.judge.kv_cache_gb": row("grpo", "plan", *JUDGE, "roles.judge.judge.kv_cache_gb=1"),
    "roles.NAME.options": row(
        "grpo", "tests/roles/test_custom_role.py::test_the_example_roles_score_as_their_parts_do"
    ),
    "roles.NAME.ranks": row("grpo", "plan", "roles.rollout.ranks=0"),
    "roles.NAME.device": row("grpo", "plan", "roles.policy.device=cpu"),
    "roles.NAME.dp_replicate": row("grpo", "refused error", "roles.policy.dp_replicate=3"),
    "roles.NAME.dp_shard": row("grpo", "plan", "roles.policy.dp_shard=2"),
    "roles.NAME.cp": row("grpo", "plan", "roles.policy.cp=2"),
    "roles.NAME.tp": row("grpo", "plan", "roles.policy.tp=2"),
    "roles.NAME.ep": row("moe", "plan", "roles.policy.tp=2", "roles.policy.ep=2"),
    "roles.NAME.pp": row("grpo", "refused", "roles.policy.pp=2"),
    "roles.NAME.megatron": row("grpo", "refused", "roles.policy.megatron={sp: true}"),
    "roles.NAME.tp_across_nodes": row(
        "grpo",
        "tests/test_placement.py::test_a_tp_group_over_several_nodes_must_be_asked_for",
    ),
    "train.backend": row("grpo", "plan", "train.backend=megatron"),
    "train.backend_options": row("grpo", "refused", "train.backend_options={x: 1}"),
    "train.deepspeed.stage": row("grpo", "refused", "train.deepspeed.stage=3"),
    "train.deepspeed.offload": row("grpo", "refused", "train.deepspeed.offload=optimizer"),
    "train.deepspeed.config": row("grpo", "refused", "train.deepspeed.config=own.json"),
    "train.epochs": row("grpo", BOTH, "train.epochs=2"),
    "train.num_minibatches": row("grpo", BOTH, "train.num_minibatches=2"),
    "train.microbatch_tokens": row("grpo", "plan", "train.microbatch_tokens=64"),
    "train.share_prompts": row("grpo", "plan", "train.share_prompts=false"),
    "train.recompute": row("grpo", "plan", "train.recompute=layer"),
    "train.compile": row(
        "grpo",
        "tests/training/test_compiled.py::test_compiled_layers_train_as_others_do",
    ),
    "train.lr": row("grpo", BOTH, "train.lr=0.5"),
    "train.schedule": row("grpo", BOTH, "train.schedule=linear"),
    "train.warmup_steps": row("grpo", BOTH, "train.warmup_steps=2"),
    "train.min_lr_ratio": row("grpo", BOTH, "train.schedule=linear", "train.min_lr_ratio=0.5"),
    "train.betas": row("grpo", BOTH, "train.betas=[0.5,0.6]"),
    "train.eps": row("grpo", BOTH, "train.eps=0.1"),
    "train.weight_decay": row("grpo", BOTH, "train.weight_decay=100"),
    "train.clip_norm": row("grpo", "plan files", "checkpoint.export=true", "train.clip_norm=1e-9"),
    "train.head_chunk": row("grpo", "plan", "train.head_chunk=7"),
    "train.balance_coef": row("moe", BOTH, "train.balance_coef=0.5"),
    "rollout.engine": row("grpo", "plan", "rollout.engine=vllm"),
    "rollout.kv_cache_gb": row("grpo", "plan error", "rollout.kv_cache_gb=1e-9"),
    "rollout.block_size": row("grpo", "plan", "rollout.block_size=16"),
    "rollout.max_running": row("grpo", "plan", "rollout.max_running=2"),
    "rollout.prefill_tokens": row("grpo", "plan", "rollout.prefill_tokens=64"),
    "rollout.cuda_graphs": row("grpo", "plan doubt", "device=cpu", "rollout.cuda_graphs=false"),
    "rollout.adapters": row("grpo", "plan", ADAPTED, "rollout.adapters=merged"),
    "rollout.sync_bucket_mb": row(
        "grpo",
        "tests/planning/test_planned_memory.py::"
        "test_a_sync_reads_the_host_where_both_models_do_not_fit_on_the_device",
    ),
    "rollout.sync_check_every": row(
        "grpo", "tests/roles/test_canary.py::test_checksums_find_it_first"
    ),
    "rollout.turns.kind": row("grpo", "plan", "rollout.turns={kind: my_module:Environment}"),
    "rollout.turns.options": row(
        "grpo", f"{CALL}::test_limits_say_why plan", TURNS, "rollout.turns.options={size: 3}"
    ),
    "rollout.turns.max_turns": row(
        "grpo", f"{CALL}::test_limits_say_why plan", TURNS, "rollout.turns.max_turns=3"
    ),
    "rollout.turns.max_tokens": row(
        "grpo",
        "tests/flows/test_turn_flows.py::test_flows_take_turns_on_any_layout plan",
        TURNS,
        "rollout.turns.max_tokens=40",
    ),
    "rollout.turns.history": row(
        "grpo",
        "tests/flows/test_rendered_flows.py::test_samples_in_parts_train_alike_on_any_layout plan",
        TURNS,
        "rollout.turns.history=rendered",
    ),
    "rollout.turns.workers": row(
        "grpo",
        f"{CALL}::test_results_do_not_depend_on_the_workers plan",
        TURNS,
        "rollout.turns.workers=2",
    ),
    "rollout.turns.timeout_s": row(
        "grpo",
        f"{CALL}::test_a_failure_ends_its_sample_alone plan",
        TURNS,
        "rollout.turns.timeout_s=2",
    ),
    "rollout.turns.memory_gb": row("grpo", "plan", TURNS, "rollout.turns.memory_gb=1"),
    "rollout.turns.failed_reward": row(
        "grpo",
        f"{CALL}::test_a_failure_ends_its_sample_alone plan",
        TURNS,
        "rollout.turns.failed_reward=-1",
    ),
    "rollout.turns.seconds": row(
        "grpo", f"{CALL}::test_limits_say_why plan", TURNS, "rollout.turns.seconds=9"
    ),
    "sampling.temperature": row("grpo", BOTH, "sampling.temperature=0.5"),
    "sampling.top_p": row("grpo", BOTH, "sampling.top_p=0.5"),
    "sampling.top_k": row("grpo", BOTH, "sampling.top_k=5"),
    "sampling.min_p": row("grpo", BOTH, "sampling.min_p=0.1"),
    "sampling.max_tokens": row("grpo", BOTH, "sampling.max_tokens=5"),
    "sampling.stop": row("grpo", BOTH, f"sampling.stop=[{LETTERS}]"),
    "sampling.stop_token_ids": row("grpo", BOTH, f"sampling.stop_token_ids=[{ENDS}]"),
    "algorithm.advantage": row("grpo", "metrics", "algorithm.advantage=rloo"),
    "algorithm.credit": row("grpo", "refused", "algorithm.credit=turn"),
    "algorithm.advantage_std": row("grpo", "metrics", "algorithm.advantage_std=false"),
    "algorithm.policy_loss": row("grpo", "metrics", AGAIN, "algorithm.policy_loss=gspo"),
    "algorithm.teacher_coef": row("grpo", "metrics", *TEACHER, "algorithm.teacher_coef=2"),
    "algorithm.loss_mean": row("grpo", "metrics", "algorithm.loss_mean=fixed_length"),
    "algorithm.clip_low": row("grpo", "metrics", AGAIN, "algorithm.clip_low=0.001"),
    "algorithm.clip_high": row("grpo", "metrics", AGAIN, "algorithm.clip_high=0.001"),
    "algorithm.dual_clip": row("grpo", "metrics", AGAIN, "algorithm.dual_clip=1.001"),
    "algorithm.kl_coef": row("grpo", "metrics", *KL, "algorithm.kl_coef=0.5"),
    "algorithm.kl_estimator": row("grpo", "metrics", *KL, "algorithm.kl_estimator=k1"),
    "algorithm.kl_in": row("grpo", "metrics", *KL, "algorithm.kl_in=reward"),
    "algorithm.kl_target": row("ppo", "metrics", *KL, "algorithm.kl_target=5"),
    "algorithm.kl_horizon": row("ppo", "metrics", *AIMS, "algorithm.kl_horizon=500"),
    "algorithm.old_logprobs": row("grpo", "metrics", "algorithm.old_logprobs=rollout"),
    "algorithm.gamma": row("ppo", "metrics", "algorithm.gamma=0.5"),
    "algorithm.gae_lambda": row("ppo", "metrics", "algorithm.gae_lambda=0.5"),
    "algorithm.whiten_advantages": row("ppo", "metrics", "algorithm.whiten_advantages=false"),
    "algorithm.value_clip": row("ppo", "metrics", AGAIN, "algorithm.value_clip=0.001"),
    "algorithm.value_warmup_steps": row("ppo", BOTH, "algorithm.value_warmup_steps=1"),
    "algorithm.score_scaling": row("ppo", "metrics", "algorithm.score_scaling=whiten"),
    "algorithm.score_clip": row("ppo", "metrics", "algorithm.score_clip=0.1"),
    "algorithm.cut_penalty": row("ppo", "metrics", "algorithm.cut_penalty=0.5"),
    "algorithm.entropy_coef": row("grpo", "metrics", "algorithm.entropy_coef=0.1"),
    "algorithm.centre_coef": row("reward_model", "metrics", "algorithm.centre_coef=0.1"),
    "algorithm.routing_replay": row("moe", BOTH, AGAIN, "algorithm.routing_replay=true"),
    "algorithm.importance_cap": row("grpo", "metrics", "algorithm.importance_cap=0.5"),
    "algorithm.refill_attempts": row("grpo", BOTH, "algorithm.refill_attempts=2"),
    "algorithm.overlong_buffer": row("grpo", "metrics", "algorithm.overlong_buffer=5"),
    "algorithm.overlong_penalty": row(
        "grpo", "metrics", "algorithm.overlong_buffer=5", "algorithm.overlong_penalty=5"
    ),
    "preference.loss": row("dpo", BOTH, "preference.loss=ipo"),
    "preference.beta": row("dpo", BOTH, "preference.beta=0.5"),
    "preference.label_smoothing": row("dpo", BOTH, "preference.label_smoothing=0.1"),
    "preference.margin": row("dpo", BOTH, "preference.loss=simpo", "preference.margin=0.1"),
    "preference.nll_coef": row("dpo", BOTH, "preference.nll_coef=0.1"),
    "preference.length_normalise": row("dpo", BOTH, "preference.length_normalise=true"),
    "preference.kto_weights": row(
        "dpo", BOTH, "preference.loss=kto", "preference.kto_weights=[1,2]"
    ),
    "preference.reference": row("dpo", "files", "roles.reference={}", "preference.reference=step"),
    "preference.judge": row("dpo", "refused", "preference.judge=reward"),
    "preference.ties": row("dpo", "doubt", "preference.ties=reward"),
    "preference.pairs": row("online_dpo", BOTH, "preference.pairs=all"),
    "data.kind": row("grpo", "refused error", "data.kind=conversations"),
    "data.train.source": row("grpo", "plan error", "data.train.source=other.jsonl"),
    "data.train.task": row("task", BOTH, "data.train.task={min_terms: 3}"),
    "data.train.size": row("grpo", BOTH, "data.train.size=6"),
    "data.train.split": row("grpo", "doubt", "data.train.split=test"),
    "data.train.seed": row("task", BOTH, "data.train.seed=5"),
    "data.train.prompt_column": row("grpo", "plan error", "data.train.prompt_column=other"),
    "data.train.answer_column": row("grpo", "plan error", "data.train.answer_column=other"),
    "data.train.answer_pattern": row("grpo", "plan error", "data.train.answer_pattern='(zz)'"),
    "data.train.template": row("grpo", BOTH, "data.train.template='{prompt}!'"),
    "data.train.system": row("grpo", BOTH, "data.train.system=short"),
    "data.train.chat": row("grpo", BOTH, "data.train.chat=false"),
    "data.train.columns": row("sft", "metrics", "data.train.columns={response: rejected}"),
    "data.train.chat_template_kwargs": row(
        "grpo", "tests/data/test_tool_rows.py::test_variables_of_the_template"
    ),
    "data.train.share": row("grpo", BOTH, "data.train.share=1/2"),
    "data.train.unique": row("grpo", BOTH, "data.train.unique=true"),
    "data.train.max_tokens": row("grpo", BOTH, "data.train.max_tokens=18"),
    "data.train.keep_shortest": row("grpo", BOTH, "data.train.keep_shortest=40%"),
    "data.train.on_bad_row": row(
        "grpo",
        "plan error",
        "data.train.source=BAD.jsonl",
        "data.train.on_bad_row=skip",
        "data.train.on_bad_row=error",
    ),
    "data.train.turns": row("grpo", "plan", "data.train.turns={kind: my_module:Environment}"),
    "data.mix": row("grpo", BOTH, "data.mix=[{template: '{prompt}!!'}]"),
    "data.prompts_per_step": row("grpo", BOTH, "data.prompts_per_step=3"),
    "data.group_size": row("grpo", BOTH, "data.group_size=2"),
    "rewards.0.function": row("grpo", BOTH, "rewards.0.function=exact"),
    "rewards.0.role": row(
        "grpo", "metrics", "roles.reward={head: normal}", "rewards=[{role: reward}]"
    ),
    "rewards.0.weight": row("grpo", BOTH, "rewards.0.weight=2"),
    "rewards.0.options": row("grpo", BOTH, reward("scaled"), "rewards.0.options={scale: 3.0}"),
    "reward_pool.num_workers": row("grpo", "metrics", reward("calls"), "reward_pool.num_workers=2"),
    "reward_pool.timeout_s": row(
        "grpo", "error", *FEW, reward("slow"), "reward_pool.timeout_s=0.02"
    ),
    "reward_pool.memory_gb": row("grpo", "metrics", reward("hungry"), "reward_pool.memory_gb=0.05"),
    "reward_pool.failed_reward": row(
        "grpo", "metrics", reward("half_right"), "reward_pool.failed_reward=0.5"
    ),
    "reward_pool.max_failed_share": row(
        "grpo", "error", reward("half_right"), "reward_pool.max_failed_share=0.1"
    ),
    "reward_pool.environment": row(
        "grpo", "metrics", reward("sees"), "reward_pool.environment=[SPMDRL_TEST_*]"
    ),
    "evaluation.held_out": row("grpo", "plan files", HELD),
    "evaluation.max_items": row("grpo", BOTH, "evaluation.held_out=50%", "evaluation.max_items=2"),
    "evaluation.sets": row("task", "plan files", "evaluation.sets={a: {data: {seed: 9, size: 8}}}"),
    "evaluation.threshold": row("grpo", BOTH, HELD, "evaluation.threshold=0.0"),
    "evaluation.stop_after": row("grpo", BEST),
    "evaluation.every": row("grpo", "metrics", HELD, "evaluation.every=1"),
    "evaluation.before": row("grpo", "metrics", HELD, "evaluation.before=false"),
    "evaluation.after": row("grpo", "metrics", HELD, "evaluation.after=false"),
    "evaluation.num_samples": row("grpo", BOTH, HELD, "evaluation.num_samples=2"),
    "evaluation.k": row("grpo", BOTH, *DRAWN, "evaluation.k=[2]"),
    "evaluation.sampling": row("grpo", BOTH, HELD, "evaluation.sampling={top_k: 2}"),
    "evaluation.against": row("grpo", BOTH, HELD, "evaluation.against=start"),
    "checkpoint.every": row("grpo", "files", SAVED[0], "checkpoint.every=1"),
    "checkpoint.keep_last": row("grpo", "files", *SAVED),
    "checkpoint.keep_every": row("grpo", "files", *SAVED, "checkpoint.keep_every=1"),
    "checkpoint.keep_best": row("grpo", BEST),
    "checkpoint.resume": row(
        "grpo",
        "tests/run/test_saving.py::"
        "test_a_fresh_start_keeps_older_checkpoints_aside_and_never_resumes_them",
    ),
    "checkpoint.export": row("grpo", "files", "checkpoint.export=true"),
    "checkpoint.export_as": row(
        "grpo", "files", "checkpoint.export=true", ADAPTED, "checkpoint.export_as=both"
    ),
    "checkpoint.export_dtype": row(
        "grpo", "files", "checkpoint.export=true", "checkpoint.export_dtype=bfloat16"
    ),
    "checkpoint.journal_kv": row("grpo", "plan", "checkpoint.journal_kv=false"),
    "log.tensorboard": row("grpo", "files", "log.tensorboard=true"),
    "log.trackers": row("grpo", "files", "log.trackers=[jsonl]"),
    "log.text_samples": row("grpo", "files", "log.tensorboard=true", "log.text_samples=4"),
    "log.rollouts": row("grpo", "files", "log.rollouts=1"),
    "log.on_detect": row(
        "grpo", "tests/run/test_detecting.py::test_flat_rewards_are_told_of_or_end_the_run"
    ),
    "log.progress": row(
        "grpo", "tests/flows/test_progress.py::test_every_long_phase_shows_how_far_it_is"
    ),
}
