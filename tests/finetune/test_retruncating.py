"""LoRA beside the product, cut back by the plain SVD: against the SVD of the merged dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.finetune.retruncating import Beside, Retruncating
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
from tests.model.test_loading import WITH_RANK_0, compressed, logits, narrow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def weights(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """What each module computes, as a matrix: its answers to the unit vectors."""
    found = {}
    with torch.no_grad():
        for name in names:
            module: Any = model.get_submodule(name)
            bias = 0 if module.bias is None else module.bias
            found[name] = (module(torch.eye(module.in_features)) - bias).T
    return found


def beside_pair(module: Any) -> Tensor:
    """What stands beside a module's low rank: kept columns and the sparse part, as a matrix."""
    spec, rest = module.spec(), torch.zeros(module.out_features, module.in_features)
    if "nnz" in spec:
        starts, inputs = module.starts.long(), module.inputs.long()
        rows = torch.arange(module.out_features).repeat_interleave(starts.diff())
        rest[rows, inputs] = module.values.detach()
    if spec.get("kept"):
        pivot = spec["format"] == "pivot"
        columns = module.order[: spec["kept"]] if pivot else module.columns
        kept = module.base.weight if pivot else module.kept.weight
        rest[:, columns.long()] = kept[:, : spec["kept"]].detach()
    return rest


@pytest.mark.parametrize("family", MODELS)
def test_it_is_the_svd_of_the_merged_matrix(family: str, tmp_path: Path) -> None:
    model = some(family)
    start, was, old = as_it_was(model)
    names = layout(model)
    beside = {name: beside_pair(model.get_submodule(name)) for name in names}
    session = begun(model, Retruncating(rank=2))
    torch.testing.assert_close(logits(model), start, atol=1e-5, rtol=1e-5)  # products are rounded to float32
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"down", "up"}
    steps(session, rate=0.02)
    merged, trained = weights(model, names), logits(model)
    assert (trained - start).abs().max() > 1e-2
    tuned = session.finish()
    assert (kinds(tuned), shapes(tuned)) == was and layout(tuned) == names
    for name, spec in names.items():
        u, s, vh = torch.linalg.svd((merged[name] - beside[name]).double())
        rank = spec["rank"]
        assert s[rank] > 1e-4 * s[0]  # something is lost
        low = ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()
        found = tuned.get_submodule(name)
        torch.testing.assert_close(found.dense(), low + beside[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(beside_pair(found), beside[name], atol=0, rtol=0)
    new = tuned.state_dict()
    assert all(torch.equal(new[n], t) for n, t in old.items() if not t.is_floating_point() and "order" not in n)
    checked_against_saved(tuned, tmp_path / "saved")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extra_ranks_lose_nothing(family: str, tmp_path: Path) -> None:
    model = some(family)
    old, count = dict(layout(model)), sum(p.numel() for p in model.parameters())
    beside = {name: beside_pair(model.get_submodule(name)) for name in old}
    session = begun(model, Retruncating(rank=3, extra=3))
    steps(session, rate=0.02)
    trained = logits(model)
    tuned = session.finish()
    torch.testing.assert_close(logits(tuned), trained, atol=1e-5, rtol=1e-5)
    assert layout(tuned) == {
        name: {**spec, "rank": min(spec["rank"] + 3, spec["out"], spec["in"] - spec.get("kept", 0))}
        for name, spec in old.items()
    }
    assert sum(p.numel() for p in tuned.parameters()) > count
    for name, wanted in beside.items():
        torch.testing.assert_close(beside_pair(tuned.get_submodule(name)), wanted, atol=0, rtol=0)
    checked_against_saved(tuned, tmp_path / "saved")


def test_without_a_step_the_function_stays() -> None:
    for extra in (0, 8):
        model = some("llama", WITH_RANK_0).double()
        start = logits(model)
        session = begun(model, Retruncating(extra=extra))
        torch.testing.assert_close(logits(model), start, atol=1e-9, rtol=1e-9)
        tuned = session.finish()
        torch.testing.assert_close(logits(tuned), start, atol=1e-9, rtol=1e-9)
        ranks = {spec["rank"] for spec in layout(tuned).values()}
        assert 0 in ranks and (extra == 0 or max(ranks) > 8)


@pytest.mark.parametrize("dense", [True, False])
def test_dense_layers_get_lora(dense: bool) -> None:
    model = some("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    before = model.get_parameter(f"{name}.weight").clone()
    session = begun(model, Retruncating(rank=2, dense=dense))
    inside: Any = model.get_submodule(name)
    assert isinstance(inside, Beside) == dense
    steps(session, rate=0.02)
    delta = (inside.scale * inside.up @ inside.down).T.detach() if dense else torch.zeros(())
    tuned = session.finish()
    torch.testing.assert_close(tuned.get_parameter(f"{name}.weight"), before + delta, atol=1e-6, rtol=1e-6)
    assert torch.equal(tuned.get_parameter(f"{name}.weight"), before) == (not dense)


def test_a_layer_with_lora_has_the_weight_it_stands_for() -> None:
    """Some models look at the weight of a layer; a narrowed layer gets LoRA too."""
    model, name = narrow(FAMILIES["llama"].make(), {0: 24}), "model.layers.1.self_attn.q_proj"
    whole = compressed(FAMILIES["llama"].make())
    model.set_submodule(name, whole.get_submodule(name))
    session = begun(model, Retruncating(rank=2))
    steps(session, rate=0.02)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        layer, x = model.get_submodule(name), torch.randn(3, 32)
        assert isinstance(layer, Beside) and layer.up.any()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    session.finish()
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), modules.ResizedLinear)


def test_the_scale_and_the_dropout() -> None:
    inner = nn.Linear(6, 5)
    layer = Beside(inner, 2, 3, 2.5, 0.5, torch.Generator().manual_seed(0))
    nn.init.normal_(layer.up)
    x = torch.randn(4, 6)
    wanted = inner(x) + 2.5 * (x[:, 2:] @ layer.down.T @ layer.up.T)
    torch.testing.assert_close(layer.eval()(x), wanted)
    assert (layer.train()(x) - wanted).abs().max() > 1e-3
    layer.merge()
    torch.testing.assert_close(inner(x), wanted)
    bound = 4**-0.5  # Kaiming, as LoRA has it: uniform within ± 1 / √n
    assert layer.down.abs().max() <= bound and layer.down.abs().max() > bound / 2
    made = begun(some("llama"), Retruncating(alpha=24.0, rank=4)).model
    assert {m.scale for m in made.modules() if isinstance(m, Beside)} == {6.0}


def test_the_same_seed_gives_the_same_model() -> None:
    the_seed_decides(Retruncating(rank=2))


def test_checkpointing() -> None:
    checkpointed_gradients_are_the_same(Retruncating(rank=2))


@pytest.mark.parametrize("cast", [torch.bfloat16, None])
def test_autocast(cast: torch.dtype | None) -> None:
    trains_under_autocast(Retruncating(rank=2), cast, rate=0.02)


def test_tied_weights_stay_tied() -> None:
    tied_weights_stay_tied(Retruncating(rank=2, extra=2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"extra": 9}, "extra is 9: it is from 0 to rank, 8"),
        ({"extra": -1}, "extra is -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Retruncating(**settings)


def test_a_dense_model_is_named() -> None:
    with pytest.raises(ValueError, match="run `spectrim compress` first"):
        begun(FAMILIES["llama"].make(), Retruncating())
