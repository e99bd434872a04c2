"""`NativeEngine.score`: what the engine makes of given tokens."""

from __future__ import annotations

import pytest
import torch
from rollout_models import (
    ARCHITECTURES,
    hugging_face_model,
    make_engine,
    prompts_of,
    request,
    tiny_model,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("prefill", "temperature"), [(7, 1.0), (2048, 0.6)])
def test_scores_are_those_of_transformers(name: str, prefill: int, temperature: float) -> None:
    model = hugging_face_model(name)
    engine = make_engine(*tiny_model(name), prefill_tokens=prefill)
    sequences = [tuple(tokens) for tokens in prompts_of(5, 1, 33, 16, 40)]
    scores = engine.score(sequences, temperature=temperature)
    for tokens, found in zip(sequences, scores, strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logprobs = model(ids).logits[0].div(temperature).log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


def test_what_generation_may_make_is_scored_up_to_the_context_s_end() -> None:
    config, source = tiny_model()
    engine = make_engine(config, source)
    room = 56
    prompt = prompts_of(config.max_position - room)[0]
    asked = [request(prompt, 0, max_tokens=room, ignore_eos=True)]
    [[sample]] = engine.generate(asked, seed=1, step=0)
    assert len(prompt) + len(sample.tokens) == config.max_position
    [scores] = engine.score([(*prompt, *sample.tokens)])
    found = torch.tensor(scores[-room:])
    torch.testing.assert_close(found, torch.tensor(sample.logprobs), atol=1e-4, rtol=0)
