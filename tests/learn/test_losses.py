"""Losses of a training step: pieces add up to the whole, and take less."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from spectrim.data.instructions import IGNORED
from spectrim.learn import losses

BATCH, LENGTH, VOCABULARY = 3, 7, 11


@pytest.fixture(params=[1, 4 * VOCABULARY, 2**19], ids=["a token", "four tokens", "all"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(losses, "PIECE", request.param)
    return int(request.param)


def some_logits(seed: int) -> Tensor:
    made = torch.randn(BATCH, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def some_wanted() -> Tensor:
    wanted = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(9))
    wanted[0, :2] = wanted[2] = IGNORED
    return wanted


@pytest.mark.usefixtures("piece")
def test_cross_entropy_is_that_of_torch_and_so_is_its_gradient() -> None:
    logits, other, wanted = some_logits(0), some_logits(0), some_wanted()
    found = losses.cross_entropy(logits, wanted)
    known = nn.functional.cross_entropy(other.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(found, known, rtol=1e-6, atol=0)
    found.backward()
    known.backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.as_tensor(other.grad))


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_divergences_are_those_of_their_formulas(heat: float) -> None:
    first, second, counts = some_logits(1), some_logits(2), some_wanted() != IGNORED
    p, q = (each.detach().double().div(heat).softmax(-1) for each in (first, second))
    known = ((p * (p / q).log()).sum(-1) * counts).sum()
    found = losses.divergence(first.detach(), second, counts, heat)
    torch.testing.assert_close(found.double(), known, rtol=1e-5, atol=0)
    found.backward()
    assert second.grad is not None
    torch.testing.assert_close(second.grad.double(), (q - p) / heat * counts[..., None], rtol=1e-4, atol=1e-6)
    if heat == 1:
        both = known + ((q * (q / p).log()).sum(-1) * counts).sum()
        found = losses.symmetric_divergence(first, second, counts)
        torch.testing.assert_close(found.double(), both, rtol=1e-5, atol=0)


def test_cross_entropy_keeps_one_array_of_the_logits_size_in_their_float32() -> None:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size() if tensor.is_floating_point() else 0
        return tensor

    logits = some_logits(3).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses.cross_entropy(logits, some_wanted())
    assert 4 * logits.numel() <= sum(kept.values()) < 4 * logits.numel() + 100


def test_pieces_are_small_but_not_too_many() -> None:
    few = next(losses._pieces(torch.zeros(2, 8192, 2**12, device="meta"), torch.zeros(2, 8192, device="meta")))
    assert [len(piece) for piece in few] == [2 * 8192 // losses.PIECES] * 2
    (small,) = next(losses._pieces(torch.zeros(2, 1024, 2**12, device="meta")))
    assert small.shape == (losses.PIECE // 2**12, 2**12)


def test_distillation_and_cross_entropy_share_the_loss() -> None:
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))
    states = [torch.randn(BATCH, LENGTH, 5, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    teacher = Fixed(some_logits(7).detach(), states[1])
    answer = SimpleNamespace(logits=some_logits(8), hidden_states=[states[0], states[0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    count = torch.tensor(BATCH * (LENGTH - 1))
    settings = losses.Distillation(weight=0.25, temperature=2.0, hidden=0.5)
    batch = losses.Micro(nn.Identity(), inputs, count, teacher, settings)
    counts = batch.wanted != IGNORED
    kl = losses.divergence(teacher.logits, answer.logits, counts, 2.0)
    gap = (states[0] - states[1]).square().sum(-1) / states[1].square().sum(-1)
    known = 0.75 * losses.cross_entropy(answer.logits, batch.wanted) + 0.25 * 4 * kl + 0.5 * (gap * counts).sum()
    torch.testing.assert_close(batch.score(answer), known / count, rtol=1e-6, atol=0)


class Fixed(nn.Module):
    """A model that says the same whatever it is asked."""

    def __init__(self, logits: Tensor, state: Tensor) -> None:
        super().__init__()
        self.logits, self.state = logits, state

    def forward(self, **inputs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits, hidden_states=[self.state, self.state])
