"""Balanced factors and flatter spectra: the properties of both, on every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.finetune.start import balanced, flattened, refined
from spectrim.model import loading, modules
from tests.families import FAMILIES
from tests.finetune.sessions import (
    as_it_was,
    kinds,
    layout,
    shapes,
    some,
)
from tests.finetune.test_retruncating import beside_pair
from tests.model.test_loading import WITH_RANK_0, compressed, logits, narrow

PLAIN = ("low_rank", "low_rank_columns", "low_rank_sparse")


def low(module: Any) -> Tensor:
    """The low-rank part of a module as a matrix."""
    found: Tensor = (module.dense().detach() - beside_pair(module)).double()
    return found


def spectrum(module: Any) -> Tensor:
    return torch.linalg.svdvals(low(module))[: module.spec()["rank"]]


def single(weight: Tensor, bias: Tensor | None = None) -> tuple[nn.Module, Any]:
    """A tiny model in which one layer is this weight, as a pair of full rank."""
    model, name = FAMILIES["llama"].make(), "model.layers.0.self_attn.o_proj"
    rank, spec = min(weight.shape), {"in": weight.shape[1], "out": weight.shape[0], "bias": bias is not None}
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    module = modules.build(
        {"format": "low_rank", **spec, "rank": rank}, {"left.weight": u, "right.weight": s[:, None] * vh}, bias
    )
    model.set_submodule(name, module)
    loading.attach(model, {name: module.spec()})
    return model, module


# balanced


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_balanced_pairs(family: str, tmp_path: Path) -> None:
    model = some(family, WITH_RANK_0)
    start, was, old = as_it_was(model)
    notes = balanced(model)
    torch.testing.assert_close(logits(model), start, atol=1e-5, rtol=1e-5)
    assert (kinds(model), shapes(model)) == was
    alone = []
    for name, spec in layout(model).items():
        module: Any = model.get_submodule(name)
        if spec["rank"] == 0 or spec["format"] not in PLAIN:
            alone.append(name)
            continue
        left, right = module.left.weight.double(), module.right.weight.double()
        wanted = torch.diag(torch.linalg.svdvals(left @ right)[: spec["rank"]])
        torch.testing.assert_close(left.T @ left, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(right @ right.T, wanted, atol=1e-5, rtol=1e-5)
    assert [note.split(":")[0] for note in notes] == alone
    new = model.state_dict()
    pairs = ("left.weight", "right.weight")
    assert all(torch.equal(new[n], t) for n, t in old.items() if not n.endswith(pairs) or n.startswith(tuple(alone)))
    assert {"rank 0" in note for note in notes} == {"pivot" in note for note in notes} == {True, False}
    loading.save(model, tmp_path)
    assert torch.equal(logits(loading.load(tmp_path)), logits(model))


def test_a_pair_of_deficient_rank_keeps_its_function() -> None:
    model, module = single(torch.randn(32, 32))
    with torch.no_grad():
        module.right.weight[5:] = 0
    before = module.dense().detach()
    balanced(model)  # type: ignore[arg-type]
    torch.testing.assert_close(module.dense(), before, atol=1e-5, rtol=1e-5)


# refined


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("preserve", ["none", "fro", "spectral"])
def test_the_spectrum_of_every_format(family: str, preserve: str) -> None:
    model = some(family, WITH_RANK_0)
    was, names = (kinds(model), shapes(model)), layout(model)
    old = {name: (low(model.get_submodule(name)), beside_pair(model.get_submodule(name))) for name in names}
    dense = {n: p.clone() for n, p in model.named_parameters() if not n.startswith(tuple(names))}
    notes = refined(model, preserve=preserve)
    assert (kinds(model), shapes(model)) == was
    assert all(torch.equal(model.get_parameter(n), p) for n, p in dense.items())
    for name, spec in names.items():
        module = model.get_submodule(name)
        torch.testing.assert_close(beside_pair(module), old[name][1], atol=0, rtol=0)
        if spec["rank"] == 0:
            assert any(note.startswith(f"{name}: rank 0") for note in notes)
            continue
        u, s, vh = torch.linalg.svd(old[name][0])
        u, s, vh = u[:, : spec["rank"]], s[: spec["rank"]], vh[: spec["rank"]]
        new = s.sqrt()
        new *= {"none": 1.0, "fro": s.norm() / new.norm(), "spectral": s[0] / new[0]}[preserve]
        torch.testing.assert_close(low(module), (u * new) @ vh, atol=2e-5, rtol=1e-4)


def test_the_published_rule() -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    model, module = single(weight)
    refined(model, preserve="none")  # type: ignore[arg-type]
    first, new = weight.double(), low(module)
    torch.testing.assert_close(torch.linalg.cond(new), torch.linalg.cond(first).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(new.norm() ** 2, torch.linalg.matrix_norm(first, "nuc"), rtol=1e-5, atol=0)
    gram, square = first @ first.T, new @ new.T
    torch.testing.assert_close(square @ square, gram, atol=1e-3, rtol=1e-4)  # (W W^T)^(1/2)
    cross = new @ first.T
    torch.testing.assert_close(cross, cross.T, atol=1e-3, rtol=1e-4)
    u, _, vh = torch.linalg.svd(first)
    inner = u.T @ new @ vh.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-4, rtol=0)


def test_fixed_points_and_scale() -> None:
    orthogonal = torch.linalg.qr(torch.randn(32, 32))[0]
    model, module = single(orthogonal)
    for preserve in ("none", "fro", "spectral"):
        refined(model, preserve=preserve)  # type: ignore[arg-type]
        torch.testing.assert_close(module.dense(), orthogonal, atol=1e-5, rtol=1e-5)
    weight = torch.randn(32, 32)
    first, second = single(weight), single(9 * weight)
    for model, _ in (first, second):
        refined(model, preserve="none")  # type: ignore[arg-type]
    torch.testing.assert_close(second[1].dense(), 3 * first[1].dense(), atol=1e-4, rtol=1e-4)


def test_a_blend_of_0_and_an_exponent_of_1_change_nothing() -> None:
    model = some("llama", WITH_RANK_0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for settings in ({"blend": 0.0}, {"exponent": 1.0}):
        assert refined(model, dense=True, biases=True, **settings) == ["blend 0 or exponent 1: nothing changes"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_blend_is_between() -> None:
    sigma = torch.tensor([9.0, 4.0, 1.0, 0.25])
    torch.testing.assert_close(flattened(sigma, 0.75, "none"), sigma**0.75)
    model, module = single(torch.diag(torch.tensor([16.0] * 16 + [1.0] * 16)))
    refined(model, exponent=0.5, blend=0.5, preserve="none")  # type: ignore[arg-type]
    torch.testing.assert_close(spectrum(module), torch.tensor([8.0] * 16 + [1.0] * 16).double(), atol=1e-5, rtol=1e-5)


def test_noise_stays_noise() -> None:
    sigma = torch.tensor([4.0, 1.0, 1e-7, 0.0])
    torch.testing.assert_close(flattened(sigma, 0.5, "none"), torch.tensor([2.0, 1.0, 1e-7, 0.0]))
    assert torch.equal(flattened(torch.zeros(3), 0.5, "fro"), torch.zeros(3))
    torch.testing.assert_close(flattened(sigma, 0.5, "fro").norm(), sigma.norm())
    assert flattened(sigma, 0.5, "spectral")[0] == 4.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dense_layers_and_biases(family: str) -> None:
    model = some(family)
    if family == "llama":
        model = narrow(FAMILIES["llama"].make(), {0: 24})
        name = "model.layers.1.self_attn.q_proj"
        model.set_submodule(name, compressed(FAMILIES["llama"].make()).get_submodule(name))
    layer = "transformer.h.0.mlp.c_fc" if family == "gpt2" else "model.layers.0.mlp.up_proj"
    weight, bias = (model.get_parameter(f"{layer}.{leaf}").detach().clone() for leaf in ("weight", "bias"))
    refined(model)
    assert torch.equal(model.get_parameter(f"{layer}.weight"), weight)
    refined(model, preserve="none", dense=True, biases=True)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(model.get_parameter(f"{layer}.weight"), (u * s.sqrt()) @ vh, atol=1e-5, rtol=1e-4)
    new = model.get_parameter(f"{layer}.bias")
    torch.testing.assert_close(new, bias / (bias.norm() + 1e-8).sqrt())
    torch.testing.assert_close(new.norm() ** 2, bias.norm())


def test_biases_of_factored_layers_and_zero_ones() -> None:
    for bias in (torch.randn(32), torch.zeros(32)):
        model, module = single(torch.randn(32, 32), bias)
        refined(model)  # type: ignore[arg-type]
        assert torch.equal(module.bias, bias)
        refined(model, biases=True)  # type: ignore[arg-type]
        torch.testing.assert_close(module.bias.detach(), bias / (bias.norm() + 1e-8).sqrt())


def test_bad_arguments_are_named() -> None:
    model = some("llama")
    for settings, words in (
        ({"exponent": 0.0}, "exponent is 0.0"),
        ({"blend": 1.5}, "blend is 1.5"),
        ({"preserve": "output"}, "preserve is 'output': it is one of fro, none, spectral"),
    ):
        with pytest.raises(ValueError, match=words):
            refined(model, **settings)
    for start in (balanced, refined):
        with pytest.raises(ValueError, match="run `spectrim compress` first"):
            start(FAMILIES["llama"].make())
