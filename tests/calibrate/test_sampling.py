"""Text that a model writes itself: drawn from its own predictions, seeded; what ends and begins; models that cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.calibrate import sampling
from spectrim.calibrate.sampling import ends, picked, sample, together
from tests.families import FAMILIES, VOCABULARY

LENGTH = 24


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
def test_every_token_is_drawn_from_the_prediction_of_the_ones_before(family: str) -> None:
    model = FAMILIES[family].make()
    rows = sample(model, 5, LENGTH, seed=3, batch=2)
    assert rows.shape == (5, LENGTH) and rows.dtype == torch.int64 and bool((rows[:, 0] == 0).all())
    draws = torch.rand(5, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():  # the whole window at once, without a cache
        shares = model(input_ids=rows, use_cache=False).logits.double().softmax(-1).cumsum(-1)
    after = shares[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
    before = (
        after - shares[:, :-1].diff(dim=-1, prepend=torch.zeros(5, LENGTH - 1, 1)).gather(2, rows[:, 1:, None])[..., 0]
    )
    assert bool(((before - 1e-5 <= draws[:, 1:]) & (draws[:, 1:] <= after + 1e-5)).all())
    assert len(rows[:, 1:].unique()) > VOCABULARY // 4


def test_the_seed_decides() -> None:
    model = FAMILIES["llama"].make().train()
    first, again, other = (sample(model, 4, LENGTH, seed, batch=4) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.training and all(module.training for module in model.modules())


def test_after_a_text_that_ended_the_next_one_begins() -> None:
    model = FAMILIES["llama"].make(bos_token_id=5, eos_token_id=[7, 9])
    rows = sample(model, 64, LENGTH, seed=0, batch=64)
    ended = torch.isin(rows[:, :-1], torch.tensor([7, 9]))
    assert ended.sum() > 20 and bool((rows[:, 1:][ended] == 5).all())
    assert len(rows[:, 1:][~ended].unique()) > VOCABULARY // 4


@pytest.mark.parametrize(
    ("tokens", "found"),
    [((3, None), (3, frozenset())), ((None, [8, 4]), (4, frozenset([8, 4]))), ((0, 0), (0, frozenset([0])))],
)
def test_where_texts_begin_and_end(tokens: tuple[int | None, object], found: tuple[int, frozenset[int]]) -> None:
    config = FAMILIES["llama"].make().config
    config.bos_token_id, config.eos_token_id = tokens
    assert ends(config) == found


def test_a_model_that_names_no_such_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bos_token_id.*give a text file"):
        sample(FAMILIES["llama"].make(bos_token_id=None), 2, LENGTH, seed=0, batch=2)


def test_predictions_that_are_not_finite_stop_it() -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        sample(model, 2, LENGTH, seed=0, batch=2)


def test_a_model_without_a_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].make()
    original = type(model).forward

    def forgetful(self: object, **given: object) -> object:
        output = original(self, **{**given, "use_cache": False})
        output.past_key_values = None
        return output

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(ValueError, match="keeps no cache"):
        sample(model, 2, LENGTH, seed=0, batch=2)


def test_draws_fall_on_tokens_by_their_shares() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(5, 3)
    found, finite = picked(logits, torch.tensor([0.0, 0.49, 0.51, 0.76, 1.0], dtype=torch.float64))
    assert found.tolist() == [0, 0, 1, 2, 2] and bool(finite.all())
    broken: Tensor = torch.tensor([[0.0, torch.nan]])
    found, finite = picked(broken, torch.tensor([0.9]).double())
    assert found.tolist() == [0] and finite.tolist() == [False]


def test_small_models_write_more_windows_at_once_than_a_batch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["gpt2"].make().config  # two blocks, 32 wide
    row = 2 * 4 * LENGTH * 32 * 2
    monkeypatch.setattr(sampling, "CACHE", 10 * row)
    assert together(config, 3, LENGTH, 4) == 10 and together(config, 30, LENGTH, 4) == 30
