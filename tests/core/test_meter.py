"""How far predictions are apart, and what a change of one matrix does to them."""

from __future__ import annotations

import pytest
import torch

from spectrim.core import meter
from spectrim.core.meter import divergences


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 5, 2**10])
def test_divergences_are_those_of_all_tokens_at_once(tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, generator = 50, torch.Generator().manual_seed(tokens)
    monkeypatch.setattr(meter, "ROWS", rows * vocabulary)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 4
    expected = torch.randn(tokens, vocabulary, generator=generator).log_softmax(-1)
    before = expected.clone(), logits.clone()
    found = divergences(expected, logits)
    assert torch.equal(found, (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1))
    exact = torch.nn.functional.kl_div(
        logits.double().log_softmax(-1), expected.double(), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(expected, before[0]) and torch.equal(logits, before[1])


def test_divergences_of_half_precision_and_of_what_is_not_finite() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(
        divergences(expected, logits.bfloat16()), divergences(expected, logits.bfloat16().float()), rtol=0, atol=0
    )
    broken = logits.clone()
    broken[1, 3] = float("nan")
    assert divergences(expected, broken).isnan().tolist() == [False, True, False]
