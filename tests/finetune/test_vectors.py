"""Two vectors a matrix: they start as nothing, train, and merge exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.finetune.vectors import Scaled, Vectors
from spectrim.model import modules
from tests.families import FAMILIES
from tests.finetune.sessions import (
    MODELS,
    as_it_was,
    begun,
    checked_against_saved,
    checkpointed_gradients_are_the_same,
    kinds,
    layout,
    shapes,
    some,
    steps,
    the_seed_decides,
    tied_weights_stay_tied,
    trains_under_autocast,
)
from tests.model.test_loading import compressed, logits
from tests.model.test_modules import IN, OUT, built, spec

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

FORMATS = [
    spec("low_rank", rank=5, bias=True),
    spec("low_rank_columns", rank=4, kept=3),
    spec("low_rank_sparse", rank=4, nnz=30, index="csr"),
    spec("pivot", rank=5, side="rows"),
    spec("pivot", rank=5, side="columns", kept=3),
    spec("pivot", rank=5, side="columns"),
    spec("pivot_sparse", rank=5, nnz=30, index="mask"),
]


@pytest.mark.parametrize("family", MODELS)
def test_starts_trains_and_merges(family: str, tmp_path: Path) -> None:
    model = some(family)
    start, was, old = as_it_was(model)
    session = begun(model, Vectors(slice=2))
    torch.testing.assert_close(logits(model), start, atol=1e-6, rtol=1e-6)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"inputs", "outputs"}
    steps(session, rate=0.1)
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-2
    tuned = session.finish()
    torch.testing.assert_close(logits(tuned), trained, atol=1e-5, rtol=1e-5)
    assert (kinds(tuned), shapes(tuned)) == was
    changed = {name for name, t in tuned.state_dict().items() if not torch.equal(t, old[name])}
    into = {"low_rank": "left", "low_rank_columns": "left", "low_rank_sparse": "left", "pivot_sparse": "mix"}
    assert changed == {
        f"{n}.{'base' if 'kept' in s and s['format'] == 'pivot' else into.get(s['format'], 'mix')}.weight"
        for n, s in layout(tuned).items()
    }
    for name, one in layout(tuned).items():
        if one["format"] == "pivot" and "kept" in one:
            key = f"{name}.base.weight"
            assert torch.equal(tuned.state_dict()[key][:, : one["kept"]], old[key][:, : one["kept"]])
    checked_against_saved(tuned, tmp_path / "saved")


@pytest.mark.parametrize("wanted", FORMATS, ids=lambda s: "-".join(map(str, s.values())))
def test_the_matrix_is_the_formula(wanted: dict[str, Any]) -> None:
    """(left + diag(b) left[:, S] diag(d) P) right beside what is kept; of a pivot by rows b is 0 at its pivots."""
    module = built(wanted)
    low = low_rank(wanted, module)
    session = begun(torch.nn.Sequential(module), Vectors(slice=3))  # type: ignore[arg-type]
    (layer,) = session.layers.values()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.outputs.copy_(torch.randn(layer.outputs.shape, generator=generator))
        layer.inputs.copy_(torch.randn(layer.inputs.shape, generator=generator))
    left, right, b = low["left"], low["right"], torch.zeros(OUT)
    b[low["moved"]] = layer.outputs.detach()
    chosen = layer.chosen - wanted.get("kept", 0) * (wanted.get("side") == "columns")
    assert (
        chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 3 and 0 <= chosen.min() <= chosen.max() < 5
    )
    added = torch.zeros_like(left)
    added[:, chosen] = b[:, None] * left[:, chosen] * layer.inputs.detach()
    expected = low["whole"].clone()
    expected[:, low["others"]] += added @ right
    x = torch.randn(6, IN)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(x), x @ expected.T + bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.dense(), expected, atol=1e-5, rtol=1e-5)
    session.finish()
    torch.testing.assert_close(module.dense(), expected, atol=1e-5, rtol=1e-5)


def low_rank(wanted: dict[str, Any], module: modules.Format) -> dict[str, Tensor]:
    """The pair by the definition of each format: whole weight, left, right, what inputs it reads, what rows move."""
    whole, rows, inputs = module.dense().detach(), torch.arange(OUT), torch.arange(IN)
    if "pivot" not in wanted["format"]:
        left, right = module.left.weight.detach(), module.right.weight.detach()  # type: ignore[union-attr]
        if "kept" in wanted:
            inputs = torch.tensor([i for i in range(IN) if i not in module.columns.tolist()])
        return {"whole": whole, "left": left, "right": right, "others": inputs, "moved": rows}
    order, rank = module.get_buffer("order").long(), wanted["rank"]
    base, mix = module.get_parameter("base.weight").detach(), module.get_parameter("mix.weight").detach()
    if wanted.get("side", "rows") == "rows":
        left = torch.zeros(OUT, rank)
        left[order] = torch.cat([torch.eye(rank), mix])
        return {"whole": whole, "left": left, "right": base, "others": inputs, "moved": order[rank:]}
    kept = wanted.get("kept", 0)
    right = torch.cat([torch.eye(rank), mix], dim=1)
    return {"whole": whole, "left": base[:, kept:], "right": right, "others": order[kept:], "moved": rows}


def slices(seed: int = 0, **settings: Any) -> dict[str, list[int]]:
    model = some("llama")
    begun(model, Vectors(**settings), seed)
    return {n: m.chosen.tolist() for n, m in model.named_modules() if isinstance(m, Scaled)}


def test_the_choice() -> None:
    drawn = slices(0, slice=2)
    assert drawn == slices(0, slice=2) != slices(1, slice=2)
    low = "model.layers.0.self_attn.q_proj.left"
    assert slices(slice=2, choice="first")[low] == [0, 1]
    assert slices(slice=2, choice="last")[low] == [3, 4]
    assert slices()[low] == [0, 1, 2, 3, 4]
    assert slices()["model.layers.0.self_attn.v_proj.base"] == [3, 4, 5, 6]


def test_a_resumed_session_has_the_same_slices() -> None:
    first, second = (begun(some("llama"), Vectors(slice=2), seed) for seed in (0, 1))
    steps(first, count=1)
    trained = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
    for name, p in second.model.named_parameters():
        if p.requires_grad:
            p.data.copy_(trained[name])
    assert not torch.equal(logits(second.model), logits(first.model))
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    assert torch.equal(logits(second.model), logits(first.model))


def test_the_same_seed_gives_the_same_model() -> None:
    the_seed_decides(Vectors(slice=2))


def test_vectors_are_float32_beside_half_precision() -> None:
    model = some("llama").bfloat16()
    session, was = begun(model, Vectors()), shapes(some("llama").bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert shapes(session.finish()) == was


def test_checkpointing() -> None:
    checkpointed_gradients_are_the_same(Vectors(slice=2))


@pytest.mark.parametrize("cast", [torch.bfloat16, None])
def test_autocast(cast: torch.dtype | None) -> None:
    trains_under_autocast(Vectors(), cast, rate=0.1)


def test_tied_weights_stay_tied() -> None:
    tied_weights_stay_tied(Vectors())


def test_bad_settings_and_models_are_named() -> None:
    with pytest.raises(ValueError, match="slice is 0"):
        Vectors(slice=0)
    odd = Vectors()
    object.__setattr__(odd, "choice", "best")  # as it comes in where types are not checked at run time
    with pytest.raises(ValueError, match=r"choice is 'best'.*random, first, last"):
        odd.__post_init__()
    with pytest.raises(ValueError, match="run `spectrim compress` first"):
        begun(FAMILIES["llama"].make(), Vectors())
    full = compressed(FAMILIES["gpt2"].make(), [{"format": "pivot", "rank": 32, "side": "rows"}])
    for name, module in list(full.named_modules()):  # those of 32 outputs have no mix; take the others out
        if isinstance(module, modules.Pivot) and module.mix is not None:
            full.set_submodule(name, torch.nn.Linear(module.in_features, module.out_features))
    with pytest.raises(ValueError, match=r"without a mix; run `spectrim compress` first"):
        begun(full, Vectors())
