"""The DeepSpeed train backend: ZeRO over the ranks with other rows or tokens, around the project's
own decoder. Passes, losses, readouts and metrics are those of the torch backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.sharding import Head
from spmdrl.models.zero_layout import ZeroParameter
from spmdrl.training.backend_steps import StepCounts, attention_of, require_parts, require_trainable
from spmdrl.training.body import Body, RoleWeights, borrowed_weights, own_weights
from spmdrl.training.decoder_pass import DecoderPass, keep_pace
from spmdrl.training.deepspeed.engine import Engine
from spmdrl.training.deepspeed.held import (
    Trained,
    Whole,
    clear_padding,
    found_again,
    layout_order,
    local_boxes,
    trained_leaves,
    unstacked,
    whole_parameters,
)
from spmdrl.training.deepspeed.options import DeepspeedOptions, check_role
from spmdrl.training.deepspeed.parts import Parts, parameter_groups
from spmdrl.training.deepspeed.settings import check_user, engine_settings, read_user
from spmdrl.training.dropout import make_dropout
from spmdrl.training.options import TrainOptions
from spmdrl.training.packing import Microbatch
from spmdrl.training.protocol import LossFn, MicrobatchProgress, OptimStep
from spmdrl.training.readout import Readout


class DeepspeedBackend:
    """A decoder on this rank of `mesh`, and DeepSpeed's engine around what of it trains.

    The arguments are those of `TorchBackend`; `deepspeed` says what ZeRO divides. A role that is
    frozen has an engine under ZeRO 3 only, which gathers its weights.

    Raises:
        ValueError: see `TorchBackend` and `check_role`; or the environment names another
            accelerator than the device's.
    """

    def __init__(
        self,
        mesh: Mesh,
        model: ModelConfig,
        checkpoint: TensorSource,
        options: TrainOptions,
        device: torch.device,
        deepspeed: DeepspeedOptions,
        *,
        trainable: bool = True,
        head: Head = "lm",
        adapter: Adapter | None = None,
        base: DeepspeedBackend | None = None,
    ) -> None:
        self.mesh, self.model, self.options, self.head = mesh, model, options, head
        self._device, self._deepspeed = device, deepspeed
        check_role(
            mesh.role,
            mesh.degrees,
            deepspeed,
            model,
            options.param_dtype,
            trainable=trainable,
            head=head,
            adapter=adapter,
            borrows=base is not None,
        )
        user = read_user(mesh.role, deepspeed.config)
        check_user(mesh.role, options, deepspeed, user)
        kernel = attention_of(mesh, model, options, device)
        self._is_sharded = deepspeed.stage == 3
        self._weights = self._make_weights(base, trainable, adapter)
        self._decoder = self.body.decoder
        self._order = layout_order(model, head, adapter)
        self._engine: Engine | None = None
        self._parameters: Mapping[str, ZeroParameter]
        if self._is_sharded and base is not None:
            # the owner's engine gathers the weights
            self._engine, self._parameters = base._engine, base._parameters
        else:
            self._parameters = whole_parameters(self._weights)
            if trainable or self._is_sharded:
                self._engine = self._make_engine(user, trainable)
        self._fill(checkpoint, borrows=base is not None)
        self._state = self._make_state(checkpoint) if trainable else None
        self._pass = DecoderPass(
            mesh=mesh,
            model=model,
            options=options,
            head=head,
            device=device,
            kernel=kernel,
            dropout=make_dropout(mesh.role, model, adapter if trainable else None, options, device),
        )
        self._steps = StepCounts()

    def _make_weights(
        self, base: DeepspeedBackend | None, trainable: bool, adapter: Adapter | None
    ) -> RoleWeights:
        mesh, options, device = self.mesh, self.options, self._device
        kind: Any = {"trainable": trainable, "head": self.head, "adapter": adapter, "zero": True}
        if base is not None:
            return borrowed_weights(base.body, mesh, options, device, **kind)
        # ZeRO 3 allocates one parameter after another, and keeps its part of each
        at = torch.device("meta") if self._is_sharded else device
        return own_weights(mesh, self.model, options, at, **kind)

    def _make_engine(self, user: Mapping[str, Any], trainable: bool) -> Engine:
        options, deepspeed = self.options, self._deepspeed
        num_values = sum(p.numel for p in self._parameters.values() if p.trained)
        settings = engine_settings(options, deepspeed, num_values, user)
        engine = Engine(settings, self.mesh, self._device)
        whole = Whole(self._weights)
        if self._is_sharded:
            engine.shard(whole)
            self._weights = found_again(self._weights, sharded=True)
        trained = trained_leaves(self._weights, self._order)
        adamw = None
        if trainable:
            groups = parameter_groups(trained, options.weight_decay)
            adamw = torch.optim.AdamW(
                groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True
            )
        module = whole if self._is_sharded else Trained(self._decoder, trained)
        engine.start(module, adamw)
        # it has moved the parameters into flat buffers
        self._weights = found_again(self._weights, sharded=self._is_sharded)
        return engine

    def _fill(self, checkpoint: TensorSource, *, borrows: bool) -> None:
        """Read the weights that are this role's own, and keep them as boxes."""
        self._boxes = {
            leaf.name: local_boxes(
                leaf, self._parameters[leaf.name], self.mesh, sharded=self._is_sharded
            )
            for leaf in self._weights.leaves
        }
        own = self._weights.own if borrows else self._weights.leaves
        if self._is_sharded:
            clear_padding(own)
        fill((box for leaf in own for box in self._boxes[leaf.name].values()), checkpoint)

    def _make_state(self, checkpoint: TensorSource) -> Parts:
        assert self._engine is not None
        leaves = trained_leaves(self._weights, self._order)
        state = Parts(
            self._engine.optimizer,
            leaves,
            [self._parameters[leaf.name] for leaf in leaves],
            self._deepspeed.stage,
            self.mesh,
        )
        state.fill(checkpoint)
        return state

    @property
    def body(self) -> Body:
        """The decoder and its leaves, which other backends may share."""
        return self._weights.body

    def forward(
        self, batch: Batch, readout: Readout, *, progress: MicrobatchProgress | None = None
    ) -> Batch:
        self._require_weights()
        if not self._is_sharded:
            call, pace = self._decoder, _alone
            return self._pass.forward(call, self._weights, batch, readout, pace, progress)
        assert self._engine is not None
        with self._engine.gathering():
            gathered = unstacked(self._engine)
            return self._pass.forward(
                gathered, self._weights, batch, readout, self._paced, progress
            )

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
        engine, state = self._require_state()
        self._require_weights()
        state.hold()
        engine.accumulate()
        with engine.gathering():
            return self._pass.forward_backward(
                unstacked(engine) if self._is_sharded else engine,
                self._weights,
                batch,
                loss_fn,
                readout,
                self._paced,
                normaliser=normaliser,
                step=self._steps.num_steps,
                backward=engine.backward,
                whole_groups=whole_groups,
                progress=progress,
            )

    def optim_step(self) -> OptimStep:
        engine, state = self._require_state()
        require_parts(self.mesh.role, self.parts(), "weights", "optimizer")
        if not engine.has_gradient:  # no rank had a row
            return self._steps.count(0.0, self.options)
        state.complete()
        engine.reduce()
        norm = float(state.norm(self._device))
        if norm == 0 or not math.isfinite(norm):
            state.discard()
        else:
            clip = self.options.clip_norm
            state.step(self._steps.lr(self.options), clip / norm if norm > clip else 1.0)
        return self._steps.count(norm, self.options)

    def local_tensors(self) -> LocalTensors:
        return {name: box for boxes in self._boxes.values() for name, box in boxes.items()}

    def parts(self) -> dict[str, list[Tensor]]:
        """Return the parts, of which those that DeepSpeed holds on the host have no tensors."""
        parts = self._held_weights()
        if self._state is not None and self._deepspeed.offload == "none":
            weights = [tensor for tensors in parts.values() for tensor in tensors]
            parts["optimizer"] = self._state.parts(weights)
        elif self._state is not None:
            parts["optimizer"] = []
        return parts

    def state_tensors(self) -> LocalTensors:
        if self._state is None:
            return {}
        fixed = [leaf for leaf in self._weights.held if not leaf.trained]
        boxes = (item for leaf in fixed for item in self._boxes[leaf.name].items())
        return {f"weights/{name}": box for name, box in boxes} | self._state.tensors

    def counters(self) -> dict[str, int]:
        return self._steps.as_dict()

    def restored(self, counters: Mapping[str, int]) -> None:
        _, state = self._require_state()
        state.refresh_weights()
        state.set_step_count(self._steps.restored(counters))

    def _require_state(self) -> tuple[Engine, Parts]:
        state = require_trainable(self.mesh.role, self._state)
        assert self._engine is not None
        return self._engine, state

    def _held_weights(self) -> dict[str, list[Tensor]]:
        parts = self._weights.parts()
        return {part: [] for part in parts} if self._deepspeed.offload == "all" else parts

    def _require_weights(self) -> None:
        parts = self._held_weights()
        require_parts(self.mesh.role, parts, *parts)

    def _paced(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Add empty microbatches: each one is reduced over the ranks (from ZeRO 2 on), or has its
        weights gathered over them (ZeRO 3).
        """
        return keep_pace(microbatches, self.mesh.group("reduce"))


def _alone(microbatches: list[Microbatch]) -> list[Microbatch]:
    """Keep no pace: nothing is sent between ranks."""
    return microbatches
