"""calibrate.sequential: each block decomposed from inputs that went through the compressed blocks before it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.recipe import RecipeError
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
TARGETS_OF_BLOCK = 7


def recipe_of(
    tmp_path: Path,
    decompose: str = "whitened_svd",
    allocate: str = "uniform",
    sequential: bool = True,
    blocks: tuple[int, ...] = (0, 1),
) -> str:
    """A group a block, so that one block has the same budget with the other and without it."""
    path = tmp_path / f"{decompose}-{allocate}-{sequential}-{blocks}.yaml"
    methods = f"decompose: {{method: {decompose}}}, allocate: {{method: {allocate}}}"
    groups = [f"{{match: '*.{block}.*', ratio: 0.3, {methods}}}" for block in blocks]
    path.write_text(f"calibrate: {{sequential: {str(sequential).lower()}}}\ngroups: [{', '.join(groups)}]")
    return str(path)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


CASES = [("qwen3", each) for each in ("whitened_svd", "input_weighted_svd", "pooled_covariance", "column_svd")]


@pytest.mark.parametrize(("name", "decompose"), [*CASES, ("gpt2", "whitened_svd"), ("gemma2", "whitened_svd")])
def test_it_is_one_block_compressed_after_the_other(name: str, decompose: str, tmp_path: Path) -> None:
    directory = save_model(FAMILIES[name].make(), tmp_path / "dense")
    result = spectrim.compress(
        directory, recipe_of(tmp_path, decompose=decompose), text=CALIBRATION, out=tmp_path / "out"
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # the same by hand: block 0 made dense again from its factors, then block 1 on its own
    model = FAMILIES[name].make()
    for block in range(2):
        by_block = recipe_of(tmp_path, decompose, sequential=False, blocks=(block,))
        made = spectrim.compress(model, by_block, text=CALIBRATION)
        chosen = {key: value.counts for key, value in made.plan.choices.items()}
        assert chosen == {key: value.counts for key, value in result.plan.choices.items() if key in chosen}
        _fold(model, list(chosen))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-3)
    plain = spectrim.compress(
        FAMILIES[name].make(), recipe_of(tmp_path, decompose=decompose, sequential=False), text=CALIBRATION
    )
    assert plain.model is not None
    assert (logits(plain.model) - logits(found)).abs().max() > 1e-2, "the second block saw other inputs"


def _fold(model: PreTrainedModel, names: list[str]) -> None:
    """Dense linear layers in the place of compressed ones, in a model that no longer knows that it was compressed."""
    for name in names:
        module = model.get_submodule(name)
        dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
        with torch.no_grad():
            dense.weight.copy_(module.dense())
            if module.bias is not None:
                dense.bias.copy_(module.bias)
        model.set_submodule(name, dense)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None


def test_from_memory_and_from_disk_are_the_same_and_nothing_stays_swapped(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"].make(), tmp_path / "dense")
    asked = recipe_of(tmp_path)
    spectrim.compress(directory, asked, text=CALIBRATION, out=tmp_path / "out")
    live = FAMILIES["llama"].make()
    spectrim.compress(live, asked, text=CALIBRATION)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(live), logits(found), rtol=0, atol=1e-5)


def test_another_run_makes_nothing_again_and_another_ratio_only_what_follows(
    llama_dir: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    asked = recipe_of(tmp_path)

    def run(out: str, ratio: float) -> None:
        spectrim.compress(llama_dir, asked, ratio, CALIBRATION, tmp_path / out, work=tmp_path / "work")

    run("first", 0.3)
    assert calls == {"streamed": 1, "directions": 2 * TARGETS_OF_BLOCK}
    run("again", 0.3)
    assert calls == {"streamed": 1, "directions": 2 * TARGETS_OF_BLOCK}
    assert tree_hash(tmp_path / "first", "run.json") == tree_hash(tmp_path / "again", "run.json")
    run("smaller", 0.5)
    assert calls == {"streamed": 2, "directions": 3 * TARGETS_OF_BLOCK}, "the first block's inputs are the same"


@pytest.mark.parametrize("at", [1, 4, 9, 13])
def test_a_killed_run_goes_on_to_the_same_bytes(
    at: int, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrim.methods import svd

    asked, original, count = recipe_of(tmp_path), svd.directions, 0
    spectrim.compress(llama_dir, asked, text=CALIBRATION, out=tmp_path / "whole")

    def interrupting(*args: object) -> object:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(svd, "directions", interrupting)
        with pytest.raises(KeyboardInterrupt):
            spectrim.compress(llama_dir, asked, text=CALIBRATION, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    spectrim.compress(llama_dir, asked, text=CALIBRATION, out=tmp_path / "out")
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")


def test_an_allocator_of_candidates_plans_on_the_original_model_first(tmp_path: Path, llama_dir: Path) -> None:
    first = spectrim.compress(
        llama_dir, recipe_of(tmp_path, decompose="whitened_svd", allocate="unirank", sequential=False),
        text=CALIBRATION, out=tmp_path / "one",
    )  # fmt: skip
    asked = recipe_of(tmp_path, allocate="unirank")
    second = spectrim.compress(llama_dir, asked, text=CALIBRATION, out=tmp_path / "two")
    assert {n: c.counts for n, c in second.plan.choices.items()} == {n: c.counts for n, c in first.plan.choices.items()}
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert not torch.equal(logits(one), logits(two))


def test_gradients_of_the_whole_model_are_refused(tmp_path: Path, llama_dir: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"FisherSVD needs FisherColumns\(\), .* cannot run with calibrate\.sequential"
    ):
        spectrim.compress(llama_dir, recipe_of(tmp_path, decompose="fwsvd"), text=CALIBRATION, out=tmp_path / "out")
