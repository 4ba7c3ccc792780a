"""Full tuning of the factors; and what the tests of every way of tuning share: a batch and a loop of a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.core.finetuner import Finetuner, Session, finetuners
from spectrim.finetune.full import Full
from spectrim.model import loading
from tests.families import FAMILIES
from tests.model.test_loading import SIZES, compressed, logits, narrow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# grouped queries and tied embeddings; biases in attention and FFN; Conv1D, whose first block is left dense
MODELS = ["llama_tied", "llama", "gpt2"]
ROWS = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(5))


class Rows:
    """A batch of token rows: next-token cross entropy."""

    def __init__(self, model: Any, rows: Tensor = ROWS) -> None:
        self.model, self.rows = model, rows

    def answer(self) -> Any:
        return self.model(self.rows)

    def score(self, answer: Any) -> Tensor:
        return nn.functional.cross_entropy(answer.logits[:, :-1].flatten(0, 1).float(), self.rows[:, 1:].flatten())

    def distance(self, first: Any, second: Any) -> Tensor:
        p, q = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
        return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def steps(session: Session, count: int = 3, rate: float = 1e-2, cast: torch.dtype | None = None) -> list[float]:
    """A few steps of AdamW with weight decay and clipping, as the loop calls a session; the losses."""
    trained = [p for p in session.model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=rate, weight_decay=0.1), []
    session.model.train()
    for step in range(count):
        session.before(step, count)
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            loss = session.loss(Rows(session.model))
        loss.backward()
        session.differentiated(step, count)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        session.moved(step, count)
        losses.append(loss.item())
    session.model.eval()
    return losses


def begun(model: PreTrainedModel, way: Finetuner, seed: int = 0) -> Session:
    """A session on the model, all of it frozen before, as it is handed over."""
    model.requires_grad_(False)
    return way.begin(model, 0, torch.Generator().manual_seed(seed))


def some(family: str, sizes: list[dict[str, Any]] = SIZES, seed: int = 0) -> PreTrainedModel:
    """A model with every format; of a gpt2 the first block stays dense."""
    model = FAMILIES[family].make(seed)
    dense = dict(model.get_submodule("transformer.h.0").named_modules()) if family == "gpt2" else {}
    model = compressed(model, sizes)
    for name, module in dense.items():
        if type(module).__name__ == "Conv1D":
            model.set_submodule(f"transformer.h.0.{name}", module)
    if dense:
        left = {name: spec for name, spec in layout(model).items() if ".h.0." not in name}
        loading.attach(model, left)
    return model


def layout(model: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = model.hf_quantizer.layout
    return found


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}


def checked_against_saved(model: PreTrainedModel, directory: Path) -> None:
    """Nothing trains, nothing hangs on; saved and loaded it gives the same."""
    assert not [name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None]
    loading.save(model, directory)
    assert loading.read_layout(directory) == layout(model)
    assert torch.equal(logits(loading.load(directory)), logits(model))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.train().zero_grad()
    Rows(model).score(Rows(model).answer()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed_gradients_are_the_same(way: Finetuner) -> None:
    """Checkpointing computes the blocks again, to the same gradients."""
    model = begun(some("llama_tied"), way).model
    for parameter in model.parameters():  # away from a start where gradients are zero
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model)
    assert found.keys() == wanted.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in wanted.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def trains_under_autocast(way: Finetuner, cast: torch.dtype | None, rate: float = 5e-3) -> None:
    """In bfloat16, by autocast from float32 or as it is, the loss falls, and ends finite."""
    model = some("llama_tied")
    if cast is None:
        model = model.bfloat16()
    before = shapes(model)
    session = begun(model, way)
    losses = steps(session, count=4, rate=rate, cast=cast)
    assert losses[-1] < losses[0]
    tuned = session.finish()
    assert torch.isfinite(logits(tuned)).all()
    assert shapes(tuned) == before


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
