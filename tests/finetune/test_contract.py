"""What every registered way of tuning must hold to, found in the registry."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.core.finetuner import Session, finetuners
from spectrim.learn.losses import Distillation, Micro
from spectrim.learn.tuning import load_trained, save_trained, trained
from spectrim.measure.evaluate import parameters
from spectrim.model import loading, modules
from tests.families import FAMILIES
from tests.model.test_loading import SIZES, compressed

TOKENS = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(1))
# What leaves the function as it is until the first step, and what merges exactly.
UNCHANGED = {"rank_preserving", "full", "vectors", "retruncating"}
EXACT = {"rank_preserving", "full", "vectors"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@dataclass
class Case:
    """A model that a way of tuning can begin on, and the dense one beside it."""

    model: PreTrainedModel
    dense: PreTrainedModel | None


def case(name: str) -> Case:
    dense = FAMILIES["llama_tied"].make()
    way = finetuners()[name]()
    model = copy.deepcopy(dense) if way.wants == "dense" else compressed(copy.deepcopy(dense), SIZES)
    return Case(model.requires_grad_(False), dense.requires_grad_(False) if way.beside else None)


def begun(name: str, found: Case, stage: int = 0) -> Session:
    return finetuners()[name]().begin(found.model, stage, torch.Generator().manual_seed(7), found.dense)


def stepped(session: Session, steps: range, total: int) -> None:
    """Steps of AdamW, the optimizer new at the first."""
    optimizer = torch.optim.AdamW(trained(session.model).values(), lr=1e-3)
    for step in steps:
        session.before(step, total)
        inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
        batch = Micro(session.model, inputs, torch.tensor(TOKENS[:, 1:].numel()), None, Distillation())
        loss = session.loss(batch)
        assert bool(loss.isfinite())
        loss.backward()
        session.differentiated(step, total)
        optimizer.step()
        session.moved(step, total)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", sorted(UNCHANGED))
def test_step_0_is_the_model(name: str) -> None:
    found = case(name)
    before = logits(found.model)
    session = begun(name, found)
    scale = before.abs().max()
    torch.testing.assert_close(logits(session.model) / scale, before / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(finetuners()))
def test_it_trains_and_ends_as_a_model_of_the_same_size(name: str, tmp_path: Path) -> None:
    found = case(name)
    before, layout = parameters(found.model)["total"], _layout(found.model)
    first = {key: tensor.clone() for key, tensor in found.model.state_dict().items()}
    session = begun(name, found)
    assert trained(session.model)
    stepped(session, range(6), 6)
    unmerged = logits(session.model)
    made = session.finish().requires_grad_(False)
    assert parameters(made)["total"] == before
    assert _layout(made) == layout
    assert made.state_dict().keys() == first.keys()
    assert any(not torch.equal(made.state_dict()[key], tensor) for key, tensor in first.items())
    if name in EXACT:
        scale = unmerged.abs().max()
        torch.testing.assert_close(logits(made) / scale, unmerged / scale, rtol=0, atol=1e-5)
    (loading.save if layout else type(made).save_pretrained)(made, tmp_path / "made")
    assert torch.equal(logits(loading.load(tmp_path / "made")), logits(made))
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight


@pytest.mark.parametrize("name", sorted(finetuners()))
def test_what_is_saved_is_all_there_is(name: str, tmp_path: Path) -> None:
    """A session saved and loaded into a new one goes on to the same bytes."""
    one = begun(name, case(name))
    stepped(one, range(3), 6)
    save_trained(one, tmp_path)
    stepped(one, range(3, 6), 6)
    other = begun(name, case(name))
    load_trained(other, tmp_path)
    stepped(other, range(3, 6), 6)
    wanted = one.finish().state_dict()
    for key, tensor in other.finish().state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("name", sorted(finetuners()))
def test_the_same_seed_gives_the_same_model(name: str) -> None:
    made = []
    for _ in range(2):
        session = begun(name, case(name))
        stepped(session, range(2), 2)
        made.append(session.finish().state_dict())
        torch.rand(3)  # the global generator is none of its business
    assert all(torch.equal(tensor, made[1][key]) for key, tensor in made[0].items())


def _layout(model: Any) -> dict[str, Any]:
    return {name: spec for name, module in model.named_modules() if (spec := modules.spec_of(module)) is not None}
