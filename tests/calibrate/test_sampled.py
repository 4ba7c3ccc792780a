"""Gradients at outputs under labels that the model draws: against autograd by hand, and the draws against the odds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.collect import Wanted
from spectrim.calibrate.resident import resident, sampled
from spectrim.calibrate.statistics import FisherColumns, Gram, OutputFisher, Statistic, Tokens
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from tests.families import FAMILIES, VOCABULARY

LENGTH = 12


def token_ids(count: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(4))


def padding(side: str, count: int) -> Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(count, LENGTH, dtype=torch.bool)
    mask[0, -5:] = False
    return mask if side == "right" else mask.flip(1)


def batches(ids: Tensor, mask: Tensor | None, size: int) -> list[Batch]:
    starts = range(0, len(ids), size)
    return [Batch(ids[i : i + size], None if mask is None else mask[i : i + size]) for i in starts]


def by_hand(name: str, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Σ g gᵀ by module: each sequence alone, with the labels that `sampled` draws for it."""
    model = FAMILIES[name].make()
    modules = [t.name for t in targets.find(model).targets]
    outputs: dict[str, Tensor] = {}
    for module in modules:
        model.get_submodule(module).register_forward_hook(lambda _, __, y, module=module: outputs.update({module: y}))
    found: dict[str, Tensor] = {}
    for row in range(len(ids)):
        real = torch.ones(LENGTH, dtype=torch.bool) if mask is None else mask[row]
        options = {} if mask is None else {"attention_mask": mask[row : row + 1].long()}
        logits = model(ids[row : row + 1], use_cache=False, **options).logits[0][real]
        labels = sampled(logits.detach(), ids[row][real])
        loss = -logits.log_softmax(-1).gather(1, labels[:, None]).sum()
        gradients = torch.autograd.grad(loss, [outputs[module] for module in modules])
        for module, gradient in zip(modules, gradients, strict=True):
            g = gradient.reshape(LENGTH, -1)[real].double()
            found[module] = found.get(module, torch.zeros(1)) + g.T @ g
    return found


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_output_fisher_is_that_of_each_sequence_by_hand_whatever_the_batches(name: str, side: str) -> None:
    model = FAMILIES[name].make()
    structure = share_inputs(model, targets.find(model))
    ids = token_ids()
    mask = padding(side, len(ids))
    expected = by_hand(name, ids, mask)
    each: tuple[Statistic, ...] = (OutputFisher(), Tokens(), Gram())
    wanted = {i: Wanted(dict.fromkeys(structure.of_block(i), each)) for i in range(structure.count)}
    first, second = (dict(resident(model, structure, batches(ids, mask, size), wanted)) for size in (1, 2))
    for index, block in first.items():
        for target in structure.of_block(index):
            found, again = block.of(target)[target.name], second[index].of(target)[target.name]
            count = ids.numel() if mask is None else int(mask.sum())
            mean = expected[target.name] / count
            torch.testing.assert_close(found[OutputFisher()], mean, rtol=1e-4, atol=1e-5 * float(mean.abs().max()))
            assert torch.equal(found[OutputFisher()], again[OutputFisher()]), "batches do not matter"
            assert float(found[Tokens()]) == count
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_kind_of_labels_has_its_own_backward_pass() -> None:
    """Together they measure what each measures alone."""
    model = FAMILIES["llama"].make()
    structure = share_inputs(model, targets.find(model))

    def measure(*each: Statistic) -> dict[Statistic, Tensor]:
        target = structure.of_block(0)[0]
        wanted = {0: Wanted({target: each})}
        return dict(resident(model, structure, batches(token_ids(), None, 2), wanted))[0].of(target)[target.name]

    together = measure(FisherColumns(), OutputFisher())
    assert torch.equal(together[FisherColumns()], measure(FisherColumns())[FisherColumns()])
    assert torch.equal(together[OutputFisher()], measure(OutputFisher())[OutputFisher()])


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("every", [2, 3, 100])
def test_of_some_sequences_alone_while_others_give_what_needs_no_gradient(every: int, side: str) -> None:
    model = FAMILIES["llama"].make()
    structure = share_inputs(model, targets.find(model))
    ids = token_ids()
    mask = padding(side, len(ids))
    some = slice(0, None, every)
    expected = by_hand("llama", ids[some], None if mask is None else mask[some])
    each: tuple[Statistic, ...] = (OutputFisher(every), Tokens(), Gram(), FisherColumns())
    without = (OutputFisher(every), Tokens(), Gram())
    wanted = lambda chosen: {  # noqa: E731
        i: Wanted(dict.fromkeys(structure.of_block(i), chosen)) for i in range(structure.count)
    }
    whole = dict(resident(model, structure, batches(ids, mask, 1), wanted((Tokens(), Gram()))))
    count = len(ids[some]) * ids.shape[1] if mask is None else int(mask[some].sum())
    for chosen in (each, without):
        found = dict(resident(model, structure, batches(ids, mask, 2), wanted(chosen)))
        for index, block in found.items():
            for target in structure.of_block(index):
                of_target, all_of_it = block.of(target)[target.name], whole[index].of(target)[target.name]
                mean = expected[target.name] / count
                scale = float(mean.abs().max())
                torch.testing.assert_close(of_target[OutputFisher(every)], mean, rtol=1e-4, atol=1e-5 * scale)
                torch.testing.assert_close(of_target[Gram()], all_of_it[Gram()], rtol=1e-5, atol=1e-5)
                assert of_target[Tokens()] == all_of_it[Tokens()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_labels_are_drawn_as_often_as_the_model_says() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    ids = torch.randint(1000, (20_000,), generator=torch.Generator().manual_seed(0))
    drawn = sampled(shares.log().expand(len(ids), -1), ids)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == 0, "what cannot come does not"
    expected = shares * len(ids)
    used = shares > 0
    # χ² with 3 degrees of freedom: above 21 once in 10 000 seeds
    assert float(((counts - expected)[used] ** 2 / expected[used]).sum()) < 21


def test_a_draw_depends_on_its_sequence_alone() -> None:
    logits, ids = torch.zeros(200, 50), torch.arange(200)
    torch.manual_seed(1)
    first = sampled(logits, ids)
    torch.manual_seed(2)
    assert torch.equal(sampled(logits, ids), first)
    assert not torch.equal(sampled(logits, ids + 1), first)
    assert sampled(torch.full((3, 5), torch.nan), ids[:3]).tolist() == [0, 0, 0]


def test_the_mean_over_draws_is_the_hessian_of_the_kl() -> None:
    """At the logits themselves: E[g gᵀ] = diag p − p pᵀ."""
    logits = torch.tensor([1.0, -0.5, 0.3, 0.0])
    p = logits.double().softmax(-1)
    labels = sampled(logits.expand(40_000, -1), torch.arange(40_000))
    g = torch.eye(4, dtype=torch.float64)[labels] - p
    torch.testing.assert_close(g.T @ g / len(g), p.diag() - torch.outer(p, p), rtol=0, atol=0.01)
