"""FFNs that lose channels, in every family, from disk and in memory: as a dense FFN with those channels silent.

And models in which low rank, kept columns and lost channels stand side by side.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.core import budget
from spectrim.model import modules, targets
from spectrim.model.live import Installed
from spectrim.model.targets import oriented
from tests.conftest import save_model
from tests.families import EXPERTS, FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
WITH_FFN = [name for name in FAMILIES if name not in EXPERTS]
# what says the width in a configuration; BLOOM's is always four times the hidden size
WIDTH_KEYS = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size", "falcon_new": "ffn_hidden_size"}


def recipe_of(tmp_path: Path, *groups: str, calibrate: str = "{}") -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"calibrate: {calibrate}\ngroups:\n" + "".join(f"  - {group}\n" for group in groups))
    return str(path)


CHANNELS = "{match: ffn, ratio: 0.4, decompose: {method: channel_prune, protect: 0.1}}"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def silenced(model: PreTrainedModel, kept: dict[str, Tensor]) -> PreTrainedModel:
    """The dense model with the columns of `down` that do not stay set to zero."""
    with torch.no_grad():
        for name, index in kept.items():
            module = model.get_submodule(name)
            lost = torch.ones(oriented(module, module.weight).shape[1], dtype=torch.bool)
            lost[index] = False
            oriented(module, module.weight)[:, lost] = 0
    return model


def kept_channels(dense: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, Tensor]:
    """By module of role `down`: which of the dense columns are left, found by comparing values."""
    found = {}
    for ffn in targets.find(dense).ffns:
        name = ffn.parts[-1].module
        whole = oriented(dense.get_submodule(name), dense.get_submodule(name).weight)
        module = pruned.get_submodule(name)
        left = oriented(module, module.weight)
        equal = (left.T[:, None, :] == whole.T[None, :, :]).all(-1)
        assert (equal.sum(1) == 1).all(), "every column that stays is one of the dense ones, bit for bit"
        found[name] = equal.int().argmax(1)
        assert (found[name].diff() > 0).all(), "in their own order"
    return found


@pytest.mark.parametrize("name", WITH_FFN)
def test_a_pruned_ffn_is_the_dense_one_with_channels_silent(name: str, tmp_path: Path) -> None:
    dense = FAMILIES[name].make()
    directory, out = save_model(dense, tmp_path / "dense"), tmp_path / "out"
    result = spectrim.compress(directory, recipe_of(tmp_path, CHANNELS), text=CALIBRATION, out=out)
    pruned = AutoModelForCausalLM.from_pretrained(out)
    kept = kept_channels(dense, pruned)
    ffns = targets.find(dense).ffns
    width = int(0.6 * ffns[0].channels)
    assert {len(index) for index in kept.values()} == {width} and len(kept) == len(ffns)
    assert result.plan.spent == sum(budget.count(result.plan.choices[t.name], t) for t in ffns)
    size = sum(pruned.get_submodule(p.module).weight.numel() for t in ffns for p in t.parts)
    assert size == result.plan.spent
    torch.testing.assert_close(logits(pruned), logits(silenced(FAMILIES[name].make(), kept)), rtol=1e-4, atol=1e-5)
    live = FAMILIES[name].make()
    spectrim.compress(live, recipe_of(tmp_path, CHANNELS), text=CALIBRATION)
    assert torch.equal(logits(live), logits(pruned))
    spectrim.save(live, tmp_path / "again") if name == "bloom" else live.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(pruned))


@pytest.mark.parametrize("name", WITH_FFN)
def test_one_width_is_native_and_needs_nothing_of_ours(name: str, tmp_path: Path) -> None:
    directory, out = save_model(FAMILIES[name].make(), tmp_path / "dense"), tmp_path / "out"
    spectrim.compress(directory, recipe_of(tmp_path, CHANNELS), text=CALIBRATION, out=out)
    config = json.loads((out / "config.json").read_text())
    if name == "bloom":
        assert {spec["format"] for spec in config["quantization_config"]["layout"].values()} == {"dense"}
        return
    assert "quantization_config" not in config and "auto_map" not in config
    ffn = targets.find(FAMILIES[name].make()).ffns[0]
    assert config[WIDTH_KEYS.get(name, "intermediate_size")] == int(0.6 * ffn.channels)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not any(modules.spec_of(module) for module in model.modules())


def with_columns(name: str) -> PreTrainedModel:
    """Matrices of rank 2 but for a few columns, which no low rank gives back."""
    model, generator = FAMILIES[name].make(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for target in targets.find(model).targets:
            weight = oriented(model.get_submodule(target.name), model.get_submodule(target.name).weight)
            rows, width = weight.shape
            weight.copy_(torch.randn(rows, 2, generator=generator) @ torch.randn(2, width, generator=generator) / 4)
            weight[:, 3:19] = torch.randn(rows, 16, generator=generator)
    return model


MIXED = (
    "{{match: [q, k, v, o, qkv], ratio: 0.3, format: {0}, decompose: {{method: column_svd, accept: 0.0}}}}",
    "{{match: ffn, ratio: 0.25, format: {0}, decompose: {{method: channel_prune}}}}",
)
ONE_GROUP = (
    "{{match: [q, k, v, o, qkv, ffn], ratio: 0.3, format: {0}, decompose: ["
    "{{method: channel_prune, match: ffn}}, {{method: pooled_covariance, match: v}},"
    " {{method: column_svd, accept: 0.0}}]}}",
)


@pytest.mark.parametrize("format", ["plain", "pivot"])
@pytest.mark.parametrize("groups", [MIXED, ONE_GROUP], ids=["a budget a group", "one budget"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon", "bloom"])
def test_formats_side_by_side(name: str, groups: tuple[str, ...], format: str, tmp_path: Path) -> None:
    dense = with_columns(name)
    directory, out = save_model(dense, tmp_path / "dense"), tmp_path / "out"
    asked = recipe_of(tmp_path, *(group.format(format) for group in groups))
    result = spectrim.compress(directory, asked, text=CALIBRATION, out=out)
    found = AutoModelForCausalLM.from_pretrained(out)
    live = with_columns(name)
    again = spectrim.compress(live, asked, text=CALIBRATION)
    assert again.plan == result.plan
    assert any("column" in choice.counts for choice in result.plan.choices.values()), "columns are kept somewhere"
    assert any("channel" in choice.counts for choice in result.plan.choices.values())
    torch.testing.assert_close(logits(found), logits(live), rtol=0, atol=1e-6)
    spent = result.summary["parameters"]
    biases = _lost_biases(dense, found)
    assert spent["total_before"] - spent["total_after"] == spent["targets_before"] - spent["targets_after"] + biases
    spectrim.save(found, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(found))


def _lost_biases(dense: PreTrainedModel, found: PreTrainedModel) -> int:
    """Entries of biases that went with their channels: no target counts them."""
    lost = 0
    for ffn in targets.find(dense).ffns:
        for part in ffn.parts[:-1]:
            before, after = dense.get_submodule(part.module).bias, found.get_submodule(part.module).bias
            lost += 0 if before is None else before.numel() - after.numel()
    return lost


@pytest.mark.parametrize("format", ["plain", "pivot"])
def test_exact_columns_stay_bit_for_bit(format: str, tmp_path: Path) -> None:
    dense = with_columns("llama")
    group = f"{{match: [q, o], ratio: 0.4, format: {format}, decompose: {{method: column_svd, accept: 0.0}}}}"
    directory, out = save_model(dense, tmp_path / "dense"), tmp_path / "out"
    result = spectrim.compress(directory, recipe_of(tmp_path, group), text=CALIBRATION, out=out)
    found = AutoModelForCausalLM.from_pretrained(out)
    seen = 0
    for name, choice in result.plan.choices.items():
        if choice.keep is not None:
            columns = list(choice.keep["column"])
            assert torch.equal(
                found.get_submodule(name).dense()[:, columns], dense.get_submodule(name).weight[:, columns]
            )
            assert len(columns) == choice.counts["column"]
            seen += 1
    assert seen


def test_a_new_bias_is_counted_and_kept(tmp_path: Path) -> None:
    for name in ("qwen3", "llama"):  # without and with biases
        dense = FAMILIES[name].make()
        directory, out = save_model(dense, tmp_path / name / "dense"), tmp_path / name / "out"
        group = "{match: '*', ratio: 0.3, decompose: {method: pooled_covariance}}"
        result = spectrim.compress(directory, recipe_of(tmp_path, group), text=CALIBRATION, out=out)
        spent = result.summary["parameters"]
        assert spent["total_before"] - spent["total_after"] == spent["targets_before"] - spent["targets_after"]
        model = AutoModelForCausalLM.from_pretrained(out)
        live = FAMILIES[name].make()
        spectrim.compress(live, recipe_of(tmp_path, group), text=CALIBRATION)
        torch.testing.assert_close(logits(live), logits(model), rtol=0, atol=1e-6)
        for module in result.plan.choices:
            assert model.get_submodule(module).bias is not None


@pytest.mark.parametrize("name", WITH_FFN)
def test_a_live_model_runs_on_from_any_state_as_by_itself(name: str) -> None:
    model = FAMILIES[name].make()
    live = Installed(model, targets.find(model), {}, CALIBRATION, 3)
    for ids in live.batches(6, 20):
        state = live.run(ids, live.enter(ids), 0, 1)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        assert torch.equal(live.logits(ids, live.run(ids, state, 1, live.blocks)), expected)
    assert [ids.shape for ids in live.batches(99, 99)] == [(3, 24), (3, 24), (2, 24)]
