"""End to end in every family: target weights of exactly low rank, so that what comes out must compute the same.

A wrong orientation, a lost bias, a name that does not load or a split of fused rows changes the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.model.targets import find_blocks
from tests.conftest import save_model
from tests.families import EXPERTS, FAMILIES, LAYERS, VOCABULARY, lower_rank

RANK = 3
Built = tuple[PreTrainedModel, Path]
CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """A family's model with targets of rank 3, in memory and on disk; made once, and only read."""

    @functools.cache
    def build(name: str) -> Built:
        model = FAMILIES[name].make()
        lower_rank(model, find_blocks(model), RANK)
        return model, save_model(model, tmp_path_factory.mktemp("families") / name)

    return build


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def continuation(model: PreTrainedModel) -> list[list[int]]:
    ids = model.generate(PROMPT[:, :8], attention_mask=torch.ones(2, 8), max_new_tokens=4, do_sample=False)
    return ids.tolist()


@pytest.mark.parametrize("format", ["plain", "pivot"])
@pytest.mark.parametrize("name", FAMILIES)
def test_compressed_from_disk_computes_the_same(
    name: str, format: str, built: Callable[[str], Built], tmp_path: Path
) -> None:
    dense, directory = built(name)
    out = tmp_path / "out"
    result = spectrim.compress(directory, "whitened", ratio=0.3, format=format, text=CALIBRATION, out=out)
    # every target is replaced, at a rank that its weight needs or more
    assert len(result.plan.choices) == LAYERS * len(FAMILIES[name].roles)
    assert min(choice.counts["rank"] for choice in result.plan.choices.values()) >= RANK
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert {type(model.get_submodule(target)).__name__ for target in result.plan.choices} == {
        {"plain": "LowRank", "pivot": "Pivot"}[format]
    }
    expected = logits(dense)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert continuation(model) == continuation(dense)
    if format == "pivot":
        spectrim.save(model, tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_below_that_rank_it_does_not(name: str, built: Callable[[str], Built], tmp_path: Path) -> None:
    """The test above could not fail if the targets had no part in the logits."""
    dense, directory = built(name)
    result = spectrim.compress(directory, "svd", ratio=0.84, out=tmp_path / "out")
    assert min(choice.counts["rank"] for choice in result.plan.choices.values()) < RANK
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-2


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_stay_as_they_are_and_the_output_says_so(
    name: str, built: Callable[[str], Built], tmp_path: Path
) -> None:
    dense, directory = built(name)
    result = spectrim.compress(directory, "svd", ratio=0.3, out=tmp_path / "out")
    for index in range(LAYERS):
        for module in FAMILIES[name].dense:
            assert any(f".{index}.{module}: experts or router, left dense" in note for note in result.plan.notes)
    assert result.summary["plan"]["notes"] == list(result.plan.notes)
    before, after = dense.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    outside = [key for key in before if ".mlp." in key]
    assert outside and all(torch.equal(before[key], after[key]) for key in outside)
