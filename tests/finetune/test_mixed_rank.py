"""Mixed-rank tuning: the two networks at p = 1 and 0, draws that follow from numbers, and an end without W_s."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.core.finetuner import finetuners
from spectrim.finetune import factored
from spectrim.finetune.mixed_rank import Mixed, MixedRank, Mixing, drawn
from spectrim.model import loading, modules
from tests.families import FAMILIES, linears, lower_rank
from tests.finetune.test_prune import Text, optimizer_of, run, trained
from tests.model.test_loading import block_list, compressed

EACH = pytest.mark.parametrize("family", ["llama_tied", "gpt2"])


def pruned(family: str) -> PreTrainedModel:
    model = FAMILIES[family].make()
    with torch.no_grad():
        for i, layer in enumerate(linears(model, block_list(model)).values()):
            weight = layer.get_parameter("weight")
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(i)) < 0.6)
    return model.requires_grad_(False)


def small(family: str) -> PreTrainedModel:
    """Every format, and one matrix without rank; all else as in `pruned`."""
    return compressed(pruned(family)).requires_grad_(False)


def exact(family: str, rank: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Factors, and a dense model that is their product."""
    dense = lower_rank(FAMILIES[family].make(), block_list(FAMILIES[family].make()), rank)
    model, layout = copy.deepcopy(dense), {}
    for name, old in linears(model, block_list(model)).items():
        weight = old.weight if isinstance(old, nn.Linear) else old.weight.T
        u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
        spec = {"format": "low_rank", "in": weight.shape[1], "out": len(weight), "rank": rank}
        layout[name] = modules.checked({**spec, "bias": old.bias is not None})
        tensors = {"left.weight": u[:, :rank] * s[:rank], "right.weight": v[:rank]}
        model.set_submodule(name, modules.build(layout[name], tensors, old.bias))
    loading.attach(model, layout)
    return model.requires_grad_(False), dense.requires_grad_(False)


def begun(model: PreTrainedModel, dense: PreTrainedModel, seed: int = 3, **settings: Any) -> Mixing:
    session = MixedRank(**settings).begin(model, 0, torch.Generator().manual_seed(seed), dense)
    assert isinstance(session, Mixing)
    return session


def logits(model: Any, step: int = 0) -> Tensor:
    with torch.no_grad():
        found: Tensor = Text(model, step).answer().logits
    return found


def test_what_it_is() -> None:
    assert finetuners()["mixed_rank"] is MixedRank
    assert (MixedRank().wants, MixedRank().beside, MixedRank().stages) == ("factors", True, 1)
    assert [MixedRank().chance(step, 8) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert MixedRank(start=1.0, share=1.0).chance(3, 4) == 0.25


@EACH
def test_always_drawn_it_is_the_dense_network_never_the_factors(family: str) -> None:
    session = begun(small(family), pruned(family), start=1.0, share=0.5, consistency=0.0)
    text, expected = Text(session.model, 0), Text(pruned(family), 0)
    low = logits(small(family))
    for step, wanted in ((0, logits(pruned(family))), (5, low)):
        session.before(step, 10)
        loss = session.loss(text)
        torch.testing.assert_close(loss, expected.score(type("Answer", (), {"logits": wanted})))
        assert all(layer.whole == (step == 0) for layer in session.mixed.values())
        session.differentiated(step, 10)
        torch.testing.assert_close(logits(session.model), low), "outside of a step the factors compute"
    assert (logits(pruned(family)) - low).abs().max() > 0.1


def test_each_matrix_is_drawn_for_itself() -> None:
    session = begun(small("llama_tied"), pruned("llama_tied"))
    session.before(0, 10)
    first, second = session.draws
    assert first != second and {True, False} == set(first) == set(second)
    session._choose(first)
    for (name, layer), whole in zip(session.mixed.items(), first, strict=True):
        x = torch.randn(3, layer.factors.in_features)
        dense = pruned("llama_tied").get_submodule(name)
        torch.testing.assert_close(layer(x), dense(x) if whole else layer.factors(x))


def test_draws_follow_from_seed_step_and_draw() -> None:
    assert drawn(1, 2, 0, 20, 0.5) == drawn(1, 2, 0, 20, 0.5)
    others = [drawn(*numbers, 20, 0.5) for numbers in ((1, 2, 0), (2, 2, 0), (1, 3, 0), (1, 2, 1))]
    assert all(one != other for i, one in enumerate(others) for other in others[:i])
    # a higher chance adds matrices, and the mean is the chance
    assert all(a <= b for a, b in zip(drawn(1, 2, 0, 99, 0.2), drawn(1, 2, 0, 99, 0.6), strict=True))
    for chance in (0.0, 0.3, 1.0):
        mean = sum(sum(drawn(7, step, 0, 50, chance)) for step in range(200)) / 10000
        assert mean == pytest.approx(chance, abs=0.02 if chance == 0.3 else 0)


@EACH
def test_the_loss_is_two_tasks_and_their_distance(family: str) -> None:
    session = begun(small(family), pruned(family), consistency=0.7)
    session.before(0, 10)
    text = Text(session.model, 0)
    loss, answers = session.loss(text), []
    assert text.passes == 2
    for draw in session.draws:
        session._choose(draw)
        answers.append(text.answer())
    task = (text.score(answers[0]) + text.score(answers[1])) / 2
    distance = text.distance(*answers)
    assert distance > 0.01
    torch.testing.assert_close(loss, task + 0.7 * distance)


def test_one_pass_where_one_is_enough() -> None:
    for settings, step, passes in (({}, 4, 2), ({}, 5, 1), ({"consistency": 0.0}, 0, 1)):
        session = begun(small("gpt2"), pruned("gpt2"), **settings)
        text = Text(session.model, 0)
        session.before(step, 10)
        session.loss(text)
        assert text.passes == passes


@EACH
def test_factors_that_equal_the_weight_are_consistent(family: str) -> None:
    model, dense = exact(family, 5)
    session = begun(model, dense)
    session.before(0, 10)
    assert session.draws[0] != session.draws[1]
    text = Text(session.model, 0)
    loss = session.loss(text)
    torch.testing.assert_close(loss, text.score(Text(dense, 0).answer()), rtol=1e-5, atol=1e-5)
    session._choose(session.draws[0])
    first = text.answer()
    session._choose(session.draws[1])
    assert text.distance(first, text.answer()).item() == pytest.approx(0, abs=1e-8)


@EACH
def test_both_train_zeros_stay_and_nothing_else_moves(family: str) -> None:
    session, before = begun(small(family), pruned(family), start=1.0), small(family)
    start = trained(session.model)
    held = {name: columns.clone() for name, columns in kept(session.model)}
    optimizer = optimizer_of(session)
    run(session, optimizer, range(5), 10)
    half = {name: layer.weight.detach().clone() for name, layer in session.mixed.items()}
    for name, layer in session.mixed.items():
        dense = pruned(family).get_submodule(name)
        weight = dense.weight if isinstance(dense, nn.Linear) else dense.weight.T
        assert torch.equal(half[name] == 0, weight == 0) and not torch.equal(half[name], weight)
        assert torch.equal(layer.mask, weight != 0)
    assert all(not torch.equal(p, start[name]) for name, p in trained(session.model).items())
    run(session, optimizer, range(5, 10), 10)
    for name, layer in session.mixed.items():
        assert torch.equal(layer.weight, half[name]), "no chance, no gradient, no weight decay"
    assert all(torch.equal(columns, held[name]) for name, columns in kept(session.model))
    model = session.finish()
    for name, parameter in before.named_parameters():
        stays = not any(name.startswith(f"{module}.") for module in factored.compressed(before)) or "bias" in name
        assert not stays or torch.equal(parameter, model.get_parameter(name))


def kept(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Columns of the dense weight that are kept, wherever they are."""
    found = []
    for name, module in factored.compressed(model).items():
        if module.spec().get("kept"):
            at = module.base.weight[:, : module.spec()["kept"]] if "side" in module.spec() else module.kept.weight
            found.append((name, at.detach()))
    assert found
    return found


@EACH
def test_the_end_is_the_factors_alone(family: str, tmp_path: Path) -> None:
    before, session = small(family), begun(small(family), pruned(family))
    run(session, optimizer_of(session), range(4), 4)
    last = logits(session.model)
    model = session.finish()
    assert not any(isinstance(module, Mixed) for module in model.modules())
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in before.state_dict().items()}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.config.quantization_config.layout == before.config.quantization_config.layout
    assert torch.equal(logits(model), last) and not torch.allclose(last, logits(before), atol=1e-3)
    loading.save(model, tmp_path)
    assert torch.equal(logits(loading.load(tmp_path)), last)


@pytest.mark.parametrize("stop", [2, 7])
def test_a_resumed_run_is_the_same(stop: int) -> None:
    total, one = 8, begun(small("gpt2"), pruned("gpt2"))
    run(one, optimizer_of(one), range(total), total)

    half = begun(small("gpt2"), pruned("gpt2"))
    optimizer = optimizer_of(half)
    run(half, optimizer, range(stop), total)
    other = begun(small("gpt2"), pruned("gpt2"))
    again = optimizer_of(other)
    again.load_state_dict(optimizer.state_dict())
    saved = trained(half.model)
    assert saved.keys() == trained(other.model).keys(), "also when the dense weights are done with"
    with torch.no_grad():
        for name, tensor in saved.items():
            other.model.get_parameter(name).copy_(tensor)
    other.restore(half.state())
    run(other, again, range(stop, total), total)
    expected, found = one.finish().state_dict(), other.finish().state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_dense_model_that_was_not_pruned_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        begun(small("gpt2"), pruned("gpt2"))
        assert not caplog.records
        begun(small("gpt2"), FAMILIES["gpt2"].make())
    assert "8 of 8 matrices of the dense model have no zeros" in caplog.text


def test_models_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"q_proj' of the dense model is \(32, 32\).*, in the compressed one \(64, 32\)"
    ):
        begun(small("llama_tied"), FAMILIES["llama"].make())
    with pytest.raises(ValueError, match=r"the dense model has no module 'model\.layers\.0"):
        begun(small("llama_tied"), pruned("gpt2"))
    with pytest.raises(ValueError, match="of the dense model is a LowRank, not a linear layer"):
        begun(small("gpt2"), small("gpt2"))
    with pytest.raises(ValueError, match="no factors to tune"):
        begun(pruned("gpt2"), pruned("gpt2"))


def test_two_passes_do_not_go_with_recomputed_activations() -> None:
    session = begun(small("llama_tied"), pruned("llama_tied"))
    blocks = session.model.get_submodule("model")
    assert blocks.gradient_checkpointing is False
    blocks.gradient_checkpointing = True  # what `gradient_checkpointing_enable` sets, under whichever name
    session.before(0, 4)
    with pytest.raises(ValueError, match=r"set method\.consistency=0"):
        session.loss(Text(session.model, 0))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"start": 0.0}, "start is 0.0"),
        ({"start": 1.5}, "start is 1.5"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 2.0}, "share is 2.0"),
        ({"consistency": -1.0}, "consistency is -1.0"),
        ({"consistency": float("nan")}, "consistency is nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MixedRank(**settings)
