"""Full tuning of the factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spectrim
from spectrim.core.finetuner import Finetuner, finetuners
from spectrim.finetune.full import RELATIVE, Full
from spectrim.model import loading
from tests.families import FAMILIES
from tests.finetune.sessions import (
    MODELS,
    Rows,
    begun,
    checked_against_saved,
    checkpointed_gradients_are_the_same,
    kinds,
    layout,
    shapes,
    some,
    steps,
    trains_under_autocast,
)
from tests.model.test_loading import SIZES, compressed, logits, narrow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

WAYS = [Full(), Full(kept=True, bias=True, norms=True, embeddings=True), Full(values=False, dense=False)]
each_way = pytest.mark.parametrize("way", WAYS, ids=["usual", "all", "factors"])


@each_way
@pytest.mark.parametrize("family", MODELS)
def test_what_trains_moves_and_the_rest_stays(family: str, way: Full, tmp_path: Path) -> None:
    model = some(family)
    before, was, start = (
        {n: p.clone() for n, p in model.named_parameters()},
        (kinds(model), shapes(model)),
        logits(model),
    )
    session = begun(model, way)
    assert torch.equal(logits(model), start)
    assert min(steps(session)) > 0
    trained, wanted = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    tuned = session.finish()
    assert torch.equal(logits(tuned), trained) and (trained - start).abs().max() > 1e-3
    assert (kinds(tuned), shapes(tuned)) == was
    moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert moved == wanted == {name for name in before if trains(way, name)}
    checked_against_saved(tuned, tmp_path / "saved")


def trains(way: Full, name: str) -> bool:
    """Whether a parameter of the tiny models trains, from its name."""
    owner, leaf = name.split(".")[-2:]
    norm = any(part in name for part in ("norm", "ln_"))
    if norm:
        return way.norms
    if any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head")):
        return way.embeddings
    if leaf == "bias":
        return way.bias
    if leaf == "values":
        return way.values
    if owner == "kept":
        return way.kept
    return owner in ("left", "right", "base", "mix") or way.dense


@pytest.mark.parametrize("kept", [False, True])
def test_kept_columns_and_places_are_exact(kept: bool) -> None:
    model = some("llama")
    session = begun(model, Full(kept=kept))
    old = {name: t.clone() for name, t in model.state_dict().items()}
    steps(session)
    new = session.finish().state_dict()
    assert all(torch.equal(new[name], t) for name, t in old.items() if not t.is_floating_point())
    held = [(f"{n}.base.weight", s["kept"]) for n, s in layout(model).items() if s["format"] == "pivot" and "kept" in s]
    alone = [(f"{n}.kept.weight", s["kept"]) for n, s in layout(model).items() if s["format"] == "low_rank_columns"]
    assert len(held) > 1 and len(alone) > 1
    for name, count in (*held, *alone):
        assert torch.equal(new[name][:, :count], old[name][:, :count]) == (not kept), name
    assert all(not torch.equal(new[name][:, count:], old[name][:, count:]) for name, count in held)


def test_gradients_of_kept_columns_do_not_count_in_the_norm() -> None:
    model = some("llama")
    session = begun(model, Full())
    session.loss(Rows(model)).backward()
    name = next(n for n, s in layout(model).items() if s["format"] == "pivot" and "kept" in s)
    base = model.get_submodule(f"{name}.base").weight
    assert base.grad[:, :3].any()
    session.differentiated(0, 1)
    assert not base.grad[:, :3].any() and base.grad[:, 3:].any()


def test_a_base_of_kept_columns_alone_does_not_train() -> None:
    sizes = [{"format": "pivot", "rank": 0, "side": "columns", "kept": 3}, SIZES[0]]
    model = compressed(FAMILIES["llama"].make(), sizes)
    session = begun(model, Full())
    pure = [n for n, s in layout(model).items() if s["rank"] == 0]
    assert pure and not any(model.get_parameter(f"{name}.base.weight").requires_grad for name in pure)
    steps(session)
    session.finish()


def test_tied_weights_stay_tied() -> None:
    model = some("llama_tied")
    session = begun(model, Full(embeddings=True))
    before = model.get_input_embeddings().weight.clone()
    steps(session)
    tuned = session.finish()
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    assert not torch.equal(tuned.lm_head.weight, before)


def test_narrowed_layers_train_with_the_dense_ones() -> None:
    model, name = narrow(FAMILIES["llama"].make(), {0: 24}), "model.layers.1.self_attn.q_proj"
    whole = compressed(FAMILIES["llama"].make(), SIZES)
    model.set_submodule(name, whole.get_submodule(name))
    loading.attach(model, {**layout(model), name: layout(whole)[name]})
    for dense in (True, False):
        begun(model, Full(dense=dense))
        assert model.get_parameter(f"{name}.base.weight").requires_grad
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad == dense
        assert model.get_parameter("model.layers.1.self_attn.o_proj.weight").requires_grad == dense


def test_relative_rates_are_shares_of_each_tensor(every_format_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    """Adam's first step is as large as the rate in every entry that has a gradient: here a share of the tensor."""
    settings = ["method.relative=true", "method.norms=true", "train.lr_scheduler_type=constant", "train.warmup_ratio=0"]
    for rate in (0.02, None):
        made = spectrim.tune(
            every_format_dir, str(rows_file), tmp_path / f"out-{rate}", "full", steps=1, batch_size=4, window=16,
            learning_rate=rate, settings=settings,
        )  # fmt: skip
        rate = rate or RELATIVE
        assert made.record["learning_rate"] == rate
        assert made.record["history"][-1]["learning_rate"] == pytest.approx(rate)
        before, after = (loading.load(d, dtype=torch.float32) for d in (every_format_dir, made.directory))
        layout, moved = loading.read_layout(every_format_dir), 0
        for name, parameter in before.requires_grad_(False).named_parameters():
            owner, _, leaf = name.removesuffix(".weight").rpartition(".")
            kept = layout.get(owner, {}).get("kept", 0) if leaf == "base" else 0
            change = (after.get_parameter(name).detach() - parameter)[..., kept:].abs()
            assert kept == 0 or torch.equal(after.get_parameter(name)[:, :kept], parameter[:, :kept])
            if parameter.numel() and change.max() > 0:
                size = float(parameter[..., kept:].square().mean().sqrt())
                assert float(change.max()) == pytest.approx(rate * size, rel=2e-2), name
                moved += 1
        assert moved > 10


def test_what_is_zero_has_the_size_of_the_others() -> None:
    model = some("llama")
    names = [name for name, _ in model.named_parameters() if name.endswith("left.weight")]
    with torch.no_grad():
        model.get_parameter(names[0]).zero_()
    scales = begun(model, Full(relative=True)).scales()
    others = [scale for name, scale in scales.items() if name != names[0]]
    assert min(others) > 0 and scales[names[0]] == pytest.approx(sum(others) / len(others))
    assert begun(some("llama"), Full()).scales() == {}
    empty = some("llama")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="all that trains is zero"):
        begun(empty, Full(relative=True))


def test_a_wider_dtype_is_given_back() -> None:
    """The loop may hold what trains in float32."""
    model = some("llama").bfloat16()
    session, was = begun(model, Full()), shapes(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    steps(session, cast=torch.bfloat16)
    assert shapes(session.finish()) == was


def test_checkpointing() -> None:
    checkpointed_gradients_are_the_same(Full())


@pytest.mark.parametrize("cast", [torch.bfloat16, None])
def test_autocast(cast: torch.dtype | None) -> None:
    trains_under_autocast(Full(), cast)


def test_nothing_to_train_is_named() -> None:
    with pytest.raises(ValueError, match="run `spectrim compress` first"):
        begun(FAMILIES["llama"].make(), Full())
    empty = compressed(FAMILIES["llama"].make(), [{"format": "low_rank", "rank": 0}])
    with pytest.raises(ValueError, match="run `spectrim compress` first"):
        begun(empty, Full())


def test_they_are_registered() -> None:
    assert finetuners()["full"] is Full and isinstance(Full(), Finetuner)
    assert {"full", "vectors", "retruncating"} <= finetuners().keys()
