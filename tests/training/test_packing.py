"""Packing by hand, and its invariants on random rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import make_rows

from spmdrl.batch import Batch, from_rows
from spmdrl.models.spans import Span, covers_rows
from spmdrl.training.context import split_stream
from spmdrl.training.packing import Microbatch, empty_microbatch, pack


def group_of_three() -> Batch:
    """Prompt 7 8 9 twice with other responses, then another prompt."""
    return from_rows(
        [[7, 8, 9, 1, 2, 3], [7, 8, 9, 4, 5], [6, 1, 2]],
        rows={
            "prompt_lengths": torch.tensor([3, 3, 1]),
            "prompt_ids": torch.tensor([0, 0, 1]),
        },
    )


def test_a_shared_prompt_by_hand() -> None:
    (found,) = pack(group_of_three(), budget_tokens=100, share_prompts=True)
    # The last token of every row is left out.
    assert found.tokens.tolist() == [7, 8, 9, 1, 2, 4, 6, 1]
    assert found.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert found.spans == (
        Span(q_start=0, q_stop=3, own=(0, 3)),
        Span(q_start=3, q_stop=5, own=(3, 5), prefix=((0, 3),)),
        Span(q_start=5, q_stop=6, own=(5, 6), prefix=((0, 3),)),
        Span(q_start=6, q_stop=8, own=(6, 8)),
    )
    assert found.targets.tolist() == [1, 2, 3, 4, 5, 1, 2]
    # The prompt's last place predicts the first token of both responses.
    assert found.predict.tolist() == [2, 3, 4, 2, 5, 6, 7]
    assert found.destination.tolist() == [3, 4, 5, 9, 10, 12, 13]
    assert found.row.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert found.rows.tolist() == [0, 1, 2]


def test_without_sharing_every_row_is_one_sequence() -> None:
    (found,) = pack(group_of_three(), budget_tokens=100, share_prompts=False)
    assert found.tokens.tolist() == [7, 8, 9, 1, 2, 7, 8, 9, 4, 6, 1]
    assert [s.own for s in found.spans] == [(0, 5), (5, 9), (9, 11)]
    assert found.predict.tolist() == [2, 3, 4, 7, 8, 9, 10]


def test_equal_ids_with_other_prompts_do_not_share() -> None:
    batch = from_rows(
        [[1, 2, 3], [1, 4, 3]],
        rows={"prompt_lengths": torch.tensor([2, 2]), "prompt_ids": torch.tensor([5, 5])},
    )
    (found,) = pack(batch, budget_tokens=100, share_prompts=True)
    assert found.tokens.tolist() == [1, 2, 1, 4]


def test_equal_prompts_with_other_experts_do_not_share() -> None:
    chosen = torch.zeros(14, 1, 2, dtype=torch.uint8)
    alike = group_of_three().with_columns(tokens={"expert_choices": chosen})
    assert len(pack(alike, budget_tokens=100, share_prompts=True)[0].tokens) == 8
    other = chosen.clone()
    other[7] = 1  # the second row's second prompt token
    (found,) = pack(
        alike.with_columns(tokens={"expert_choices": other}), budget_tokens=100, share_prompts=True
    )
    assert found.tokens.tolist() == [7, 8, 9, 1, 2, 7, 8, 9, 4, 6, 1]
    assert found.origin.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 11, 12]


def test_a_group_beyond_the_budget_repeats_its_prompt_and_an_atom_stays_whole() -> None:
    batch = make_rows([10], 4, longest=9)
    cut = pack(batch, budget_tokens=20, share_prompts=True)
    assert len(cut) > 1
    assert all(len(m.tokens) <= 20 for m in cut)
    assert torch.equal(torch.cat([m.rows for m in cut]).sort()[0], torch.arange(4))
    whole = pack(batch, budget_tokens=20, share_prompts=True, atom=torch.zeros(4))
    assert len(whole) == 1
    pairs = pack(batch, budget_tokens=1, share_prompts=False, atom=torch.tensor([0, 1, 1, 0]))
    assert [m.rows.tolist() for m in pairs] in ([[0, 3], [1, 2]], [[1, 2], [0, 3]])


def test_a_row_beyond_the_budget_is_alone() -> None:
    batch = from_rows(
        [[1] * 30, [2] * 4, [3] * 4], rows={"prompt_lengths": torch.tensor([2, 2, 2])}
    )
    found = pack(batch, budget_tokens=10, share_prompts=True)
    assert [m.rows.tolist() for m in found] == [[0], [1, 2]]


def test_rows_without_loss_tokens_keep_their_place_but_no_stream() -> None:
    batch = from_rows([[1, 2], [1, 2, 3]], rows={"prompt_lengths": torch.tensor([2, 2])})
    (found,) = pack(batch, budget_tokens=10, share_prompts=True)
    assert found.rows.tolist() == [0, 1] and found.row.tolist() == [1]
    assert found.tokens.tolist() == [1, 2]
    (alone,) = pack(batch.select([0]), budget_tokens=10, share_prompts=True)
    assert alone.rows.tolist() == [0] and len(alone.predict) == 0 and len(alone.tokens) == 1
    assert not alone.is_empty and empty_microbatch().is_empty
    assert pack(batch.select([]), budget_tokens=10, share_prompts=True) == []


def test_bad_rows_are_named() -> None:
    batch = group_of_three()
    long_prompt = batch.with_columns(rows={"prompt_lengths": torch.tensor([3, 9, 1])})
    with pytest.raises(ValueError, match=r"row 1 has 5 tokens.*9"):
        pack(long_prompt, budget_tokens=10, share_prompts=True)
    no_prompt = batch.with_columns(rows={"prompt_lengths": torch.tensor([3, 3, 0])})
    with pytest.raises(ValueError, match="row 2: its first token is in the loss mask"):
        pack(no_prompt, budget_tokens=10, share_prompts=True)
    with pytest.raises(ValueError, match="microbatch_tokens=0"):
        pack(batch, budget_tokens=0, share_prompts=True)


def visible(microbatch: Microbatch) -> list[list[tuple[int, int]]]:
    """For each loss token the (token, position) pairs that its prediction sees, itself last."""
    seen = []
    for place in microbatch.predict.tolist():
        span = next(s for s in microbatch.spans if s.q_start <= place < s.q_stop)
        keys = [k for r in span.keys for k in range(*r)]
        keys = keys[: len(keys) - (span.q_stop - 1 - place)]
        pairs = zip(
            microbatch.tokens[keys].tolist(), microbatch.positions[keys].tolist(), strict=True
        )
        seen.append(list(pairs))
        assert keys[-1] == place
    return seen


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    samples=st.integers(1, 4),
    budget=st.integers(1, 60),
    share=st.booleans(),
    seconds=st.booleans(),
)
def test_every_loss_token_sees_its_own_row(
    prompts: list[int], samples: int, budget: int, share: bool, seconds: bool
) -> None:
    batch = make_rows(prompts, samples, seconds=seconds)
    found = pack(batch, budget_tokens=budget, share_prompts=share)
    starts = batch.offsets()[:-1]
    tokens = batch["tokens"].tolist()
    sources = torch.cat([m.destination for m in found]).sort()[0]
    place = torch.arange(batch.num_tokens) - starts.repeat_interleave(batch.lengths)
    default = place >= batch["prompt_lengths"].repeat_interleave(batch.lengths)
    assert torch.equal(sources, batch.tokens.get("loss_mask", default).nonzero().flatten())
    assert torch.equal(torch.cat([m.rows for m in found]).sort()[0], torch.arange(len(batch)))
    for m in found:
        assert covers_rows(m.spans) and m.spans[-1].q_stop == len(m.tokens)
        assert len(m.tokens) <= budget or len(m.rows) == 1
        assert torch.equal(m.targets, batch["tokens"][m.destination])
        assert torch.equal(m.rows[m.row], batch.row_of_token()[m.destination])
        for seen, source, row in zip(
            visible(m), m.destination.tolist(), m.rows[m.row].tolist(), strict=True
        ):
            start = int(starts[row])
            assert seen == [(tokens[start + i], i) for i in range(source - start)]


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_parts_see_what_the_whole_stream_sees(size: int) -> None:
    (whole,) = pack(make_rows([5, 7, 3], 3), budget_tokens=1000, share_prompts=True)
    parts = [split_stream(whole, rank, size) for rank in range(size)]
    length = len(parts[0].tokens)
    assert all(len(p.tokens) == length for p in parts)
    gathered = torch.cat([p.tokens for p in parts]).tolist()
    positions = torch.cat([p.positions for p in parts]).tolist()
    wanted = visible(whole)
    most = len(parts[0].predict)
    order = parts[0].order
    assert order is not None and len(order) == len(whole.predict)
    for token, place in enumerate(order.tolist()):
        part = parts[place // most]
        assert covers_rows(part.spans) and part.spans[-1].q_stop == length
        row = int(part.predict[place % most])
        span = next(s for s in part.spans if s.q_start <= row < s.q_stop)
        keys = [k for r in span.keys for k in range(*r)]
        keys = keys[: len(keys) - (span.q_stop - 1 - row)]
        assert [(gathered[k], positions[k]) for k in keys] == wanted[token]
        assert int(part.targets[place % most]) == int(whole.targets[token])


def test_zigzag_balances_a_long_sequence() -> None:
    batch = from_rows([list(range(1, 4002))], rows={"prompt_lengths": torch.tensor([1])})
    (whole,) = pack(batch, budget_tokens=5000, share_prompts=True)

    def work(rank: int) -> int:
        spans = split_stream(whole, rank, 4).spans
        return sum(s.num_queries * (s.num_keys - s.num_queries // 2) for s in spans)

    costs = [work(rank) for rank in range(4)]
    assert max(costs) < 1.01 * min(costs)


def test_a_stream_shorter_than_the_ranks_is_padded() -> None:
    parts = [split_stream(empty_microbatch(), rank, 2) for rank in range(2)]
    assert [len(p.tokens) for p in parts] == [2, 2]
    assert all(len(p.predict) == 1 and covers_rows(p.spans) for p in parts)
