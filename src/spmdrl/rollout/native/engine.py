"""`NativeEngine`: the project's own rollout engine, on the trainer's decoder.

Only storage outlives a `generate` call: no prefix cache, and no request state but the snapshot of
an aborted call. So new weights are used as soon as they arrive, and nothing must be invalidated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from spmdrl.distributed.parallel import Parallel
from spmdrl.memory.mapped import MappedArena
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.adapters import Adapter
from spmdrl.models.blocks.moe import serve_experts
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.degrees import check_tp
from spmdrl.models.files.token_texts import TokenTexts
from spmdrl.models.kernels.paged import least_shared_keys
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.native.adapters import CallAdapters, adapters_of
from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.endings import Endings
from spmdrl.rollout.native.ledger import Ledger
from spmdrl.rollout.native.loop import StepLoop
from spmdrl.rollout.native.recording import ExpertRecord, record_for
from spmdrl.rollout.native.rows import RowBuffers, RowState
from spmdrl.rollout.native.runner import Runner
from spmdrl.rollout.native.sample import Sample, leaders_of, samples_of
from spmdrl.rollout.native.sampler import Sampler
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.shared_prefix import common_prefix
from spmdrl.rollout.native.sharing import may_share
from spmdrl.rollout.native.snapshot import blocks_of, restore_snapshot, take_snapshot
from spmdrl.rollout.native.turns import TurnTaking
from spmdrl.rollout.native.weights import EngineWeights, blocked_weights
from spmdrl.rollout.native.workspace import NativeOptions, Work, Workspace
from spmdrl.rollout.protocol import (
    OWN,
    Completion,
    Progress,
    Request,
    SamplingParams,
    Turns,
)
from spmdrl.rollout.requests import check_requests, scoring_requests
from spmdrl.rollout.stops import StopRules

_PREFIX_TOKENS = 256
"""Least prompt tokens that sharing the common prefix must save, since it costs an extra step."""


class NativeEngine:
    """A `RolloutEngine`: paged cache, continuous batching, keyed sampling.

    Args:
        config: the model.
        tp: this rank's place in its tensor-parallel group, which generates in lockstep: each of its
            ranks calls `generate` with the same requests.
        ep: this rank's part of the experts, which are divided over the ranks of `tp`, and over
            those of other replicas if it has a group: these must then make each call together.
        eos_token_ids: ends of text; None means the configuration's.
        texts: the texts of tokens, for stop texts.
        adapter: the adapter that is applied to the weights, unless a request says otherwise; its
            tensors are among those that the engine needs.
        weights_leave: whether its own weights leave the device between calls; they come back at
            their addresses then, if graphs hold these and the cache does so too.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        tp: Parallel | None = None,
        ep: Parallel | None = None,
        options: NativeOptions | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        eos_token_ids: Sequence[int] | None = None,
        texts: TokenTexts | None = None,
        adapter: Adapter | None = None,
        weights_leave: bool = False,
    ) -> None:
        tp = Parallel() if tp is None else tp
        ep = Parallel() if ep is None else ep
        check_tp(model, tp.size, ep=ep.size, replicate_kv=True)
        self._model, self._tp, self._ep = model, tp, ep
        self._options = NativeOptions() if options is None else options
        self._device = torch.device("cpu") if device is None else device
        self._dtype = dtype
        eos = model.eos_ids if eos_token_ids is None else eos_token_ids
        self._stops, self._has_text = StopRules(eos, texts), texts is not None
        decoder = Decoder(model, tp=tp, ep=ep, dtype=dtype, device="meta")
        self._decoder = decoder.requires_grad_(False)
        assert ep.group is None or adapter is None, "rows with adapters are not exchanged"
        self._group = Lockstep(tp, self._device, ep.group)
        self._workspace = Workspace(
            model, decoder, self._options, self._group, tp.size, self._device, dtype
        )
        # the parts kept between calls: `RolloutEngine`'s methods for them are those of their owners
        workspace = self._workspace
        self.cache_bytes, self.graph_bytes = workspace.cache_bytes, workspace.graph_bytes
        self.release_cache, self.release_graphs = workspace.release, workspace.release_graphs
        self.close = workspace.close
        self._adapters: dict[str, AdapterWeights] = {}
        if adapter is not None:
            self._adapters[OWN] = self._make_adapter(adapter, torch.device("meta"))
        returns = weights_leave and workspace.keeps_addresses
        self.weights = EngineWeights(
            decoder,
            self._device,
            self.release_graphs,
            self._adapters.get(OWN),
            MappedArena(self._device) if returns else None,
        )
        self.local_tensors, self.adopt = self.weights.local_tensors, self.weights.adopt
        self.allocate = self.weights.allocate
        # a CPU computes a step while it is given; experts' exchanges wait for every step's end
        self._runs_ahead = self._device.type != "cpu" and not self._group.shares_experts
        self._sampler: Sampler | None = None
        self._aborted: dict[str, Tensor] = {}
        self.num_preempted = 0
        """Number of preemptions during the last call."""

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs, which hold addresses."""
        return self._workspace.captures_graphs

    @property
    def keeps_cache_address(self) -> bool:
        """Whether `release_cache` leaves the graphs, because the cache comes back where it was."""
        return self._workspace.keeps_addresses

    def new_adapter(self, name: str, adapter: Adapter) -> AdapterWeights:
        """Make this rank's tensors of another adapter of the base, for `add_adapter` once they have
        their values.

        Raises:
            ValueError: the name is taken, or the weights are not a base apart from an adapter, and
                so may change.
        """
        if OWN not in self._adapters:
            raise ValueError(
                f"adapter {name!r}: the engine's weights are no fixed base: give the policy an "
                "adapter (roles.NAME.adapter), and set rollout.adapters=unmerged"
            )
        if name in self._adapters:
            raise ValueError(f"adapter {name!r}: the engine has one of that name")
        return self._make_adapter(adapter, self._device)

    def add_adapter(self, name: str, weights: AdapterWeights) -> None:
        """Apply an adapter of `new_adapter` to requests that choose it by `name`. It stays on the
        device until `remove_adapter`.
        """
        self._adapters[name] = weights

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter that was added, with the graphs that may hold its addresses."""
        assert name != OWN, "the engine's own adapter is one of its weights"
        del self._adapters[name]
        self.release_graphs()

    def _make_adapter(self, adapter: Adapter, device: torch.device) -> AdapterWeights:
        weights = AdapterWeights(
            self._model, adapter, tp=self._tp, ep=self._ep, dtype=self._dtype, device=device
        )
        return weights.requires_grad_(False)

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
        """See `RolloutEngine.generate`.

        Args:
            turns: answers to the turns of samples, which then do not end with their first one.
        """
        self._aborted = {}
        num_blocks, adapters = self._check(requests)
        groups = [samples_of(r, i, seed=seed, step=step) for i, r in enumerate(requests)]
        samples = [sample for group in groups for sample in group]
        leaders = leaders_of(groups)
        begins = [*leaders, *(sample for sample in samples if sample.waits is not None)]
        record = record_for(self._model, begins, requests)
        call = self._name(requests, seed, step)
        resumed = blocks_of(state, call)
        with torch.inference_mode():
            if begins:
                work = self._workspace.prepare(
                    num_blocks if resumed is None else resumed, len(samples)
                )
                ledger = Ledger(self._options.max_running, experts=record is not None)
                scheduler = self._start(work, leaders, len(samples), adapters, ledger)
                if state is not None and resumed is not None:
                    restore_snapshot(state, scheduler, samples, work.attention, record)
                elif record is not None:
                    record.begin(samples)
                longest = max(request.sampling.max_tokens for request in requests)
                with blocked_weights(self._decoder, longest, adapters.only) as is_merged:
                    merged = is_merged and not adapters.by_row
                    runner = work.runner.applying(replace(adapters, experts_only=merged))
                    taking = TurnTaking(turns, self._group, scheduler, samples)
                    loop = self._loop(
                        runner, scheduler, work.rows, ledger, taking, record, requests, adapters
                    )
                    aborted = loop.run(progress, should_stop)
                    self.num_preempted = scheduler.num_preempted
                if aborted and self._options.keeps_aborted:
                    self._aborted = take_snapshot(call, scheduler, samples, work.attention, record)
            else:
                self._serve(progress)
        # if nothing was left to compute, the choices are those that came with the requests
        experts = [s.begun_experts() for s in samples] if record is None else record.of(samples)
        done = iter(zip(samples, experts, strict=True))
        return [[s.completion(e) for s, e in islice(done, len(group))] for group in groups]

    def aborted_state(self) -> dict[str, Tensor]:
        """See `RolloutEngine.aborted_state`."""
        state, self._aborted = self._aborted, {}
        return state

    def _name(self, requests: Sequence[Request], seed: int, step: int) -> dict[str, Any]:
        """Make the values that distinguish a call on this engine from others, weights aside."""
        asked = repr([(r.tokens, r.prompt_id, r.samples, r.sampling) for r in requests])
        adapters = [request.adapter for request in requests]
        return {
            "requests": blake2b(asked.encode(), digest_size=16).hexdigest(),
            **({} if set(adapters) == {OWN} else {"adapters": adapters}),
            "key": [seed, step],
            "tp": [self._tp.rank, self._tp.size],
            "dtype": str(self._dtype),
            "device": self._device.type,
            "block_size": self._workspace.block_size,
            "limits": [self._options.max_running, self._options.prefill_tokens],
        }

    def score(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        temperature: float = 1.0,
        adapters: Sequence[str | None] | None = None,
    ) -> list[list[float]]:
        """See `RolloutEngine.score`."""
        requests = scoring_requests(sequences, adapters, SamplingParams(max_tokens=1))
        num_blocks, applied = self._check(requests, generates=False)
        samples = [s for i, r in enumerate(requests) for s in samples_of(r, i, seed=0, step=0)]
        scores: list[list[float]] = [[] for _ in sequences]
        with torch.inference_mode():
            runner = None
            if samples:
                runner = self._workspace.prepare(num_blocks, len(samples)).runner.applying(applied)
            scheduler = self._scheduler(samples, num_blocks, len(samples))
            while self._group.has_step(scheduler.has_work, stop=False):
                if runner is None or not scheduler.has_work:
                    serve_experts(self._decoder)
                    continue
                plan = scheduler.plan()
                logits, _ = runner.run(plan, all_rows=True)
                logprobs = logits.div_(temperature).log_softmax(dim=-1)
                row = 0
                for chunk in plan.chunks:
                    sample, count = chunk.sample, chunk.stop - chunk.start
                    following = torch.tensor(sample.tokens[chunk.start + 1 : chunk.stop + 1])
                    rows = logprobs[row : row + len(following)]
                    row += count
                    found = rows.gather(1, following.to(rows.device)[:, None])
                    scores[sample.index] += found[:, 0].tolist()
                    if chunk.is_last:
                        scheduler.finish(sample)
        return scores

    def _check(
        self, requests: Sequence[Request], *, generates: bool = True
    ) -> tuple[int, CallAdapters]:
        """Return the requests' cache blocks and adapters; ValueError if they cannot be served."""
        self.weights.check()
        num_blocks = self._workspace.blocks_for(requests)
        check_requests(
            requests,
            self._model,
            capacity=num_blocks * self._workspace.block_size,
            fix=f"raise rollout.kv_cache_gb={self._options.kv_cache_gb}",
            has_text=self._has_text,
            generates=generates,
            adapters=self._adapters,
        )
        return num_blocks, adapters_of(requests, self._adapters, self._dtype)

    def _scheduler(
        self,
        leaders: Sequence[Sample],
        num_blocks: int,
        num_samples: int,
        prefix: int = 0,
        settle: Callable[[Sample], None] = lambda sample: None,
    ) -> Scheduler:
        num_slots = self._workspace.slots_for(num_samples)
        return Scheduler(
            leaders,
            BlockPool(num_blocks),
            block_size=self._workspace.block_size,
            max_running=self._options.max_running,
            prefill_tokens=self._options.prefill_tokens,
            prefix=prefix,
            slots=BlockPool(num_slots) if num_slots else None,
            settle=settle,
        )

    def _start(
        self,
        work: Work,
        leaders: Sequence[Sample],
        num_samples: int,
        adapters: CallAdapters,
        ledger: Ledger,
    ) -> Scheduler:
        prefix = common_prefix([leader.request.tokens for leader in leaders])
        # keys and values of one prompt differ between adapters
        worth = prefix * (len(leaders) - 1) >= _PREFIX_TOKENS and not adapters.by_row
        return self._scheduler(
            leaders, work.num_blocks, num_samples, prefix if worth else 0, ledger.settle
        )

    def _serve(self, progress: Progress | None) -> None:
        """Take part in the steps of replicas that share this one's experts, without samples."""
        while self._group.shares_experts and self._group.has_step(has_work=False, stop=False):
            serve_experts(self._decoder)
            if progress is not None:
                progress(0, 0)

    def _loop(
        self,
        runner: Runner,
        scheduler: Scheduler,
        rows: RowBuffers,
        ledger: Ledger,
        taking: TurnTaking,
        record: ExpertRecord | None,
        requests: Sequence[Request],
        adapters: CallAdapters,
    ) -> StepLoop:
        if self._sampler is None:
            self._sampler = Sampler(self._model.vocab_size, self._device)
        rules = [self._stops.of(request.sampling) for request in requests]
        vocabulary = self._model.vocab_size
        by_row = [*adapters.weights] if adapters.by_row else []
        least, block_size = least_shared_keys(self._device), self._workspace.block_size
        shares = least is not None and may_share(requests, scheduler.prefix, block_size, least)
        return StepLoop(
            decoder=self._decoder,
            group=self._group,
            runner=runner,
            scheduler=scheduler,
            rows=RowState(rows, by_row, self._dtype, shares=shares),
            ledger=ledger,
            sampler=self._sampler,
            endings=Endings(rules, [self._stops.watched(rule, vocabulary) for rule in rules]),
            taking=taking,
            record=record,
            device=self._device,
            runs_ahead=self._runs_ahead,
            release=self.release_cache,
        )
