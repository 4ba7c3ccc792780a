"""What the tests of every way of tuning share: a batch, a loop of a few steps, and what holds of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.core.finetuner import Finetuner, Session
from spectrim.model import loading
from tests.families import FAMILIES
from tests.model.test_loading import SIZES, compressed, logits

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


def as_it_was(model: PreTrainedModel) -> tuple[Tensor, tuple[Any, Any], dict[str, Tensor]]:
    """Of a model before it is tuned: its logits, the kinds and shapes of what it is made of, a copy of its weights."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return logits(model), (kinds(model), shapes(model)), weights


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


def the_seed_decides(way: Finetuner) -> None:
    """One seed gives one model, another one another."""

    def tuned(seed: int) -> Tensor:
        session = begun(some("llama"), way, seed)
        steps(session, count=1)
        return logits(session.finish())

    assert torch.equal(tuned(3), tuned(3))
    assert not torch.equal(tuned(3), tuned(4))


def tied_weights_stay_tied(way: Finetuner) -> None:
    """The head is the embedding still."""
    session = begun(some("llama_tied"), way)
    steps(session, count=1)
    tuned = session.finish()
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
