"""The Megatron train backend: tensor, sequence, pipeline and context parallelism, with Megatron's
distributed optimizer. Packing, losses, readouts and metrics are shared with the torch backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spmdrl.algorithms.metrics import combine
from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.parallel import Parallel, gather_own_grad
from spmdrl.memory.host_copies import to_device
from spmdrl.models.adapters import Adapter
from spmdrl.models.attention import PackedAttention
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.rope import inverse_frequencies, make_rope
from spmdrl.models.routing import EXPERT_CHOICES
from spmdrl.models.sharding import Head
from spmdrl.training.backend_steps import (
    StepCounts,
    as_columns,
    as_numbers,
    attention_of,
    check_head,
    loss_input,
    nothing_read,
    over_replicas,
    pack_rows,
    read_places,
    require_parts,
    require_trainable,
    support_of,
    whole_stream,
)
from spmdrl.training.context import LocalStream, split_stream, stream_part
from spmdrl.training.dropout import AdapterDropout
from spmdrl.training.experts import ExpertUse, make_balance, make_routing
from spmdrl.training.megatron.checks import MegatronOptions
from spmdrl.training.megatron.groups import prepare_process
from spmdrl.training.megatron.modules import SpanAttention, StreamParams
from spmdrl.training.megatron.optimizer import ShardedOptimizer
from spmdrl.training.megatron.pipeline import Pipeline
from spmdrl.training.megatron.role_weights import Body, borrowed_weights, own_weights
from spmdrl.training.optimizer import HostNumber
from spmdrl.training.options import TrainOptions
from spmdrl.training.packing import Microbatch
from spmdrl.training.protocol import LossFn, MicrobatchProgress, OptimStep, loss_of
from spmdrl.training.readout import Readout

Outputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageInput:
    """A microbatch on this rank's devices.

    Args:
        part: the tokens of the stream whose experts this rank chooses.
    """

    microbatch: Microbatch
    stream: LocalStream
    part: LocalStream
    tokens: Tensor  # [1, L]
    positions: Tensor  # [1, L]
    predict: Tensor  # [M]
    targets: Tensor  # [M]
    params: StreamParams


class MegatronBackend:
    """GPTModel chunks on this rank of `mesh`, and their optimizer.

    The arguments are those of `TorchBackend`; `megatron` says how stages and sequences are cut.

    Raises:
        ValueError: the attention cannot run here, or `base` is not one that can be shared.
    """

    def __init__(
        self,
        mesh: Mesh,
        model: ModelConfig,
        checkpoint: TensorSource,
        options: TrainOptions,
        device: torch.device,
        megatron: MegatronOptions,
        *,
        trainable: bool = True,
        head: Head = "lm",
        adapter: Adapter | None = None,
        base: MegatronBackend | None = None,
    ) -> None:
        self.mesh, self.model, self.options, self.head = mesh, model, options, head
        self._device = device
        self._kernel = attention_of(mesh, model, options, device)
        assert model.attention.rope is not None
        self._rope = model.attention.rope
        self._frequencies = torch.tensor(
            inverse_frequencies(self._rope, model.attention.head_dim), device=device
        )
        self._tp = Parallel(
            group=mesh.group("tp"), rank=mesh.coordinate("tp"), size=mesh.size("tp")
        )
        prepare_process(device)
        kind: Any = {"trainable": trainable, "head": head, "adapter": adapter}
        if base is None:
            self._own = own_weights(mesh, model, options, device, megatron, **kind)
        else:
            self._own = borrowed_weights(base.body, mesh, options, device, **kind)
        settings, groups, units = self.body.settings, self.body.groups, self._own.units
        self._chunks = self.body.stage.chunks
        modules = [module for chunk in self._chunks for module in chunk.modules()]
        self._attentions = [module for module in modules if isinstance(module, SpanAttention)]
        self._optimizer: ShardedOptimizer | None = None
        if trainable:
            self._optimizer = ShardedOptimizer(
                settings, units, self._own.named, groups, mesh, options
            )
            units = self._optimizer.chunks
        self._pipeline = Pipeline(mesh, settings, groups, units)
        # made after the optimizer, which moves the weights into its buffers
        self._weights, self._parts = self._own.local_tensors(), self._own.parts()
        self._is_sp = megatron.sp
        self._steps = StepCounts()
        self._dropout: AdapterDropout | None = None
        if trainable and adapter is not None and adapter.dropout > 0:
            self._dropout = AdapterDropout(mesh.role, model, adapter, options.seed, device)
        self._fill(checkpoint)

    @property
    def body(self) -> Body:
        """The chunks, which other backends may share."""
        return self._own.body

    @torch.no_grad()
    def _fill(self, checkpoint: TensorSource) -> None:
        """Read the weights, and separate masters too, so that a float32 file loses nothing."""
        own = self._own.own_tensors().values()
        for tensor, _ in own:
            tensor.zero_()  # the padding of a vocabulary stays so
        fill(own, checkpoint)
        if self._optimizer is not None:
            masters = [
                part for n, part in self._optimizer.tensors.items() if n.startswith("weights/")
            ]
            if self.options.param_dtype != torch.float32:
                for tensor, _ in masters:
                    tensor.zero_()
                fill(masters, checkpoint)

    def forward(
        self, batch: Batch, readout: Readout, *, progress: MicrobatchProgress | None = None
    ) -> Batch:
        self._require_weights()
        rows = batch.to(torch.device("cpu"))
        size = rows.num_tokens if readout.is_per_token else rows.num_rows
        found = {name: torch.zeros(size, device=self._device) for name in readout.columns}

        def finish(item: StageInput, output: Tensor) -> tuple[Tensor, None]:
            [destination] = to_device([item.microbatch.destination], self._device)
            for name, values in self._read(item, rows, output, readout).items():
                found[name][destination] = values.float()
            return output, None

        with torch.no_grad():
            items = [self._item(m, rows) for m in self._pack(rows, readout)]
            self._run(items, finish, progress, backward=False)
        self._pipeline.from_last(list(found.values()))
        return as_columns(batch, readout, found)

    def forward_backward(
        self,
        batch: Batch,
        loss_fn: LossFn,
        readout: Readout,
        *,
        normaliser: float,
        whole_groups: bool = False,
        progress: MicrobatchProgress | None = None,
    ) -> dict[str, float]:
        optimizer = require_trainable(self.mesh.role, self._optimizer)
        self._require_weights()
        optimizer.hold_gradients()
        rows = batch.to(torch.device("cpu"))

        def finish(item: StageInput, output: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
            outputs = self._read(item, rows, output, readout)
            if item.microbatch.is_empty:
                return nothing_read(outputs), None
            given = loss_input(rows, item.microbatch, readout, outputs, self._device)
            loss, metrics = loss_of(loss_fn, given)
            loss = loss / normaliser
            return loss, {"loss": loss.detach(), **metrics}

        microbatches = self._pack(rows, readout, whole_groups=whole_groups)
        coefficient = self.options.balance_coef / normaliser if readout.is_per_token else 0.0
        keys = None if self._dropout is None else self._dropout.keys(rows, self._steps.num_steps)
        items = [self._item(m, rows, balance=coefficient, keys=keys) for m in microbatches]
        parts = self._run(items, finish, progress, backward=True)
        numbers = as_numbers([part for part in parts if part is not None])
        sums = self._pipeline.object_from_last(combine([{"loss": 0.0}, *numbers]))
        return over_replicas(sums, self.mesh) | self._expert_metrics(items, rows)

    def optim_step(self) -> OptimStep:
        optimizer = require_trainable(self.mesh.role, self._optimizer)
        require_parts(self.mesh.role, self.parts(), "weights", "optimizer")
        optimizer.reduce()
        norm = optimizer.norm(self._device)
        found = HostNumber(norm)
        optimizer.step(self._steps.lr(self.options), norm)
        optimizer.clear()
        return self._steps.count(found.value(), self.options)

    def local_tensors(self) -> LocalTensors:
        return self._weights

    def parts(self) -> dict[str, list[Tensor]]:
        if self._optimizer is None:
            return dict(self._parts)
        return {**self._parts, "optimizer": self._optimizer.parts()}

    def state_tensors(self) -> LocalTensors:
        return {} if self._optimizer is None else self._optimizer.tensors

    def counters(self) -> dict[str, int]:
        return self._steps.as_dict()

    def restored(self, counters: Mapping[str, int]) -> None:
        optimizer = require_trainable(self.mesh.role, self._optimizer)
        optimizer.refresh_weights()
        optimizer.set_step_count(self._steps.restored(counters))

    def _require_weights(self) -> None:
        require_parts(self.mesh.role, self._parts, *self._parts)

    def _pack(
        self, rows: Batch, readout: Readout, *, whole_groups: bool = False
    ) -> list[Microbatch]:
        check_head(self.mesh.role, self.head, readout)
        microbatches = pack_rows(rows, self.options, readout, whole_groups=whole_groups)
        longest = max((len(m.tokens) for m in microbatches), default=0)
        if self.mesh.size("pp") > 1 and longest > self.options.microbatch_tokens:
            # All streams of a pipeline are as long as the longest: fill them with rows instead.
            microbatches = pack_rows(
                rows, self.options, readout, whole_groups=whole_groups, budget_tokens=longest
            )
        return self._pipeline.fit(microbatches)

    def _expert_metrics(self, items: list[StageInput], rows: Batch) -> dict[str, float]:
        """Compute the metrics of expert use; one rank of the role has each token of a layer."""
        if self.model.moe is None:
            return {}
        use = ExpertUse(self.model, self._device)
        for item in items:
            assert item.params.routing is not None
            use.add(item.params.routing, item.part)
        return use.metrics(
            self.mesh.group("all"),
            coefficient=self.options.balance_coef,
            is_replay=EXPERT_CHOICES in rows.tokens,
        )

    def _run(
        self,
        items: list[StageInput],
        finish: Any,
        progress: MicrobatchProgress | None,
        *,
        backward: bool,
    ) -> list[Any]:
        done, count = 0, len(items) * len(self._chunks)
        for chunk in self._chunks:
            # nothing but recomputation depends on the mode, since no dropout is above 0
            chunk.train(backward and self.options.recompute == "layer")

        def forward(chunk: Any, item: StageInput) -> Tensor:
            nonlocal done
            output: Tensor = chunk(item.tokens, item.positions, None, packed_seq_params=item.params)
            done += 1
            if progress is not None:
                progress(done, count)
            return output

        length = len(items[0].microbatch.tokens)
        with self._own.applied():
            found = self._pipeline.run(items, length, forward, finish, backward=backward)
        for attention in self._attentions:
            attention.forget()
        return found

    def _item(
        self,
        microbatch: Microbatch,
        rows: Batch,
        *,
        balance: float = 0.0,
        keys: Tensor | None = None,
    ) -> StageInput:
        """Args:
        balance: coefficient of the experts' balance loss.
        keys: those of the rows' tokens for an adapter's dropout.
        """
        stream = split_stream(microbatch, self.mesh.coordinate("cp"), self.mesh.size("cp"))
        tokens, positions, predict, targets = to_device(
            (stream.tokens, stream.positions, stream.predict, stream.targets), self._device
        )
        attend = PackedAttention(
            stream.spans,
            self._kernel,
            options=attention_options(self.model),
            dtype=self.options.param_dtype,
            device=self._device,
            cp_group=self.mesh.group("cp"),
        )
        rope = make_rope(positions, self._frequencies, self._rope)
        first, count = 0, len(stream.tokens)
        if self._is_sp:
            count //= self._tp.size
            first = self._tp.rank * count
        part = stream_part(stream, first, first + count)
        made = None
        if self.model.moe is not None:
            made = make_balance(
                rows,
                microbatch,
                part,
                self._device,
                coefficient=balance,
                normaliser=1.0,
                group=self.mesh.group("replica"),
            )
        routing = make_routing(self.model, rows, microbatch, part, self._device, made)
        dropout = None
        if self._dropout is not None and keys is not None:
            dropout = self._dropout.make(keys, stream)
        return StageInput(
            microbatch=microbatch,
            stream=stream,
            part=part,
            tokens=tokens[None],
            positions=positions[None],
            predict=predict,
            targets=targets,
            params=StreamParams(attend=attend, rope=rope, routing=routing, dropout=dropout),
        )

    def _read(self, item: StageInput, rows: Batch, output: Tensor, readout: Readout) -> Outputs:
        """Compute the readout's columns at all places of the microbatch that are read."""
        hidden = output[0]
        if self._is_sp:
            # `read_places` sums the gradient over tp: each rank takes its part of the sum
            hidden = gather_own_grad(hidden, self.mesh.group("tp"))
        weight, first_id = self._head_weight()
        found = read_places(
            hidden,
            weight,
            item.predict,
            item.targets,
            readout,
            head_chunk=self.options.head_chunk,
            tp=self._tp,
            first_id=first_id,
            support=support_of(rows, item.microbatch, item.stream, readout, self._device),
        )
        return whole_stream(found, readout, item.stream, self.mesh)

    def _head_weight(self) -> tuple[Tensor, int | None]:
        """Return the last stage's head without the vocabulary's padding, and its first token id."""
        last = self._chunks[-1]
        weight: Tensor | None = self._own.head_weight()
        if weight is None:
            weight = last.output_layer.weight
        if self.head == "score":
            assert weight is not None
            return weight, None
        if weight is None:
            weight = last.embedding.word_embeddings.weight
        first = self.mesh.coordinate("tp") * len(weight)
        real = min(max(self.model.vocab_size - first, 0), len(weight))
        return weight if real == len(weight) else weight[:real], first
