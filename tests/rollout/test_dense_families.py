"""The native engine on two ranks that share a head of keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from family_variants import FAMILIES
from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.files.hf import open_model
from spmdrl.verification.sampling import differing, make_engine, requests_of, sample
from spmdrl.verification.texts import draw_texts
from spmdrl.world import World

SHARED = ("olmo2", "phi3")
"""Norms of all heads together; rows of q, k and v in one tensor of the files."""


def differences(world: World, root: Path) -> list[float]:
    import torch.distributed as dist

    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    found = []
    for family in SHARED:
        model, source = open_model(root / family)
        requests = requests_of(draw_texts(model.vocab_size, model.source, None, 80))
        alone, together = (
            sample(make_engine(model, source, tp=place), requests) for place in (None, tp)
        )
        found.append(differing(together, alone))
    return found


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_ranks_that_share_a_head_of_keys_sample_the_same_tokens(tmp_path: Path) -> None:
    for family in SHARED:
        FAMILIES[family].write("one_kv_head", tmp_path / family)
    assert run_ranks(differences, 2, tmp_path) == [[0.0, 0.0], [0.0, 0.0]]
