"""The module and the tensors of each kind of mixer."""

from __future__ import annotations

from spmdrl.models.blocks.gated_delta import DeltaMixer, delta_tensors
from spmdrl.models.blocks.latent_attention import LatentMixer, latent_tensors
from spmdrl.models.blocks.projections import Build
from spmdrl.models.blocks.softmax_attention import Attention, attention_tensors
from spmdrl.models.specs import GatedDelta, Mixer, SoftmaxAttention
from spmdrl.models.tensors import GlobalTensor


def make_mixer(spec: Mixer, hidden: int, build: Build) -> Attention | LatentMixer | DeltaMixer:
    """Make a layer's mixer; its storage is not initialised."""
    if isinstance(spec, SoftmaxAttention):
        return Attention(spec, hidden, build)
    if isinstance(spec, GatedDelta):
        return DeltaMixer(spec, hidden, build)
    return LatentMixer(spec, hidden, build)


def mixer_tensors(spec: Mixer, hidden: int) -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names of a mixer to its tensors, named by `family.STANDARD`'s keys."""
    if isinstance(spec, SoftmaxAttention):
        return attention_tensors(spec, hidden)
    if isinstance(spec, GatedDelta):
        return delta_tensors(spec, hidden)
    return latent_tensors(spec, hidden)
