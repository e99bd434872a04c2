"""When the samples of two runs count as the same: up to rounding of the scores behind them."""

from __future__ import annotations

from spmdrl.rollout.protocol import Completion

MARGIN = 1e-4
"""In nats: what rounding may change the order of perturbed scores by."""


def assert_same(found: Completion, expected: Completion, what: object = "") -> None:
    """Equal tokens and log-probabilities, up to a first difference within the margin, which is
    printed. Where neither has margins, no token may differ.
    """
    margins = expected.margins or found.margins
    pairs = enumerate(zip(found.tokens, expected.tokens, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), None)
    if first is not None:
        assert margins, (what, first, found.tokens, expected.tokens)
        print(f"{what}: first difference at {first}, margin {margins[first]:.2e}")
        assert margins[first] < MARGIN, (what, first, margins[first])
    else:
        assert len(found.tokens) == len(expected.tokens), what
        assert found.finish == expected.finish, what
        first = len(found.tokens)
    gaps = [abs(a - b) for a, b in zip(found.logprobs[:first], expected.logprobs, strict=False)]
    assert max(gaps, default=0.0) < 1e-4, (what, max(gaps))
