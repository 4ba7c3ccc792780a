"""A dense export gives the compressed model's logits with nothing of ours, in every family."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.model import export, loading, modules
from spectrim.model.export import export_dense
from tests.families import FAMILIES
from tests.model.test_loading import compressed, logits, narrow
from tests.model.test_modules import built


def plain(directory: Path, **options: Any) -> PreTrainedModel:
    """Load with every weight read from the files, and none of them ours."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not any(modules.spec_of(module) for module in model.modules())
    assert not loading.is_compressed(directory)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    model = compressed(FAMILIES[family].make())
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), atol=1e-4, rtol=1e-4)
    config, before = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "in"))
    assert before.keys() - config.keys() == {"quantization_config", "auto_map"}
    assert config.items() <= before.items()


def test_other_files_come_along_and_the_code_does_not(tmp_path: Path) -> None:
    loading.save(compressed(FAMILIES["llama_tied"].make()), tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "pytorch_model.bin").write_text("old")
    export_dense(tmp_path / "in", tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_dtype(tmp_path: Path) -> None:
    model = compressed(FAMILIES["gpt2"].make())
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = plain(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded).float(), logits(model), atol=0.3, rtol=0.1)


def test_stored_names_without_the_base_prefix(tmp_path: Path) -> None:
    """GPT-2 as it is on the hub: no `transformer.` before the names."""
    model = compressed(FAMILIES["gpt2"].make())
    loading.save(model, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    assert torch.equal(logits(loading.load(tmp_path / "in")), logits(model))
    export_dense(tmp_path / "in", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    rank_0 = [name for name in stored if name.startswith("transformer.")]
    assert not rank_0
    assert stored["h.0.attn.c_attn.weight"].shape == (32, 96)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "key"), [("llama", "intermediate_size"), ("llama_tied", "intermediate_size")])
def test_one_narrow_width_becomes_the_config_s(family: str, key: str, tmp_path: Path) -> None:
    model = narrow(FAMILIES[family].make(), {0: 17, 1: 17})
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == 17
    loaded = plain(tmp_path / "out")
    assert loaded.num_parameters() == model.num_parameters()
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("widths", [{0: 17, 1: 20}, {1: 17}])
def test_several_narrow_widths_are_filled_with_zeros(widths: dict[int, int], tmp_path: Path) -> None:
    model = narrow(FAMILIES["llama"].make(), widths)
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    loaded = plain(tmp_path / "out")
    assert loaded.config.intermediate_size == 48
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_narrow_conv1d_is_filled(tmp_path: Path) -> None:
    """GPT-2's width is no key of its config: nothing but zeros can fill the gap. Biases and transposes take part."""
    model = FAMILIES["gpt2"].make()
    layout = {}
    for leaf, sizes in (("c_fc", {"in": 32, "out": 40}), ("c_proj", {"in": 40, "out": 32})):
        name = f"transformer.h.0.mlp.{leaf}"
        old = model.get_submodule(name)
        layout[name] = {"format": "dense", "bias": True, **sizes}
        weight = old.weight.t()[: sizes["out"], : sizes["in"]]
        model.set_submodule(name, modules.build(layout[name], {"weight": weight}, old.bias[: sizes["out"]]))
    loading.attach(model, layout)
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model))


def narrow_fused(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """The first block of a Phi-3 with fewer channels: gate and up are the halves of one weight."""
    mlp = "model.layers.0.mlp"
    fused, down = model.get_submodule(f"{mlp}.gate_up_proj").weight, model.get_submodule(f"{mlp}.down_proj").weight
    gate, up = fused.chunk(2)
    weights = {f"{mlp}.gate_up_proj": torch.cat([gate[:width], up[:width]]), f"{mlp}.down_proj": down[:, :width]}
    layout = {
        name: {"format": "dense", "in": weight.shape[1], "out": weight.shape[0], "bias": False}
        for name, weight in weights.items()
    }
    for name, weight in weights.items():
        model.set_submodule(name, modules.build(layout[name], {"weight": weight}, None))
    loading.attach(model, layout)
    return model


def test_narrow_fused_halves_are_filled_each(tmp_path: Path) -> None:
    model = narrow_fused(FAMILIES["phi3"].make(), 17)
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model))


def test_rows_that_no_layer_reads_cannot_be_restored(tmp_path: Path) -> None:
    model = FAMILIES["llama_tied"].make()
    name = "model.layers.0.mlp.up_proj"
    spec = {"format": "dense", "in": 32, "out": 40, "bias": False}
    model.set_submodule(name, built(spec))
    loading.attach(model, {name: spec})
    loading.save(model, tmp_path / "in")
    with pytest.raises(ValueError, match=rf"{name}.*40 of 48.*cannot be restored"):
        export_dense(tmp_path / "in", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def with_bias(model: PreTrainedModel, leaf: str) -> PreTrainedModel:
    """A layer of low rank with a bias its dense layer lacked."""
    name = f"model.layers.0.{leaf}"
    rows, width = model.get_submodule(name).weight.shape
    spec = {"format": "low_rank", "in": width, "out": rows, "bias": True, "rank": 3}
    model.set_submodule(name, built(spec))
    loading.attach(model, {name: spec})
    return model


def test_a_new_bias_is_switched_on_in_the_config(tmp_path: Path) -> None:
    """The other layers that get one by that get zeros."""
    model = with_bias(FAMILIES["llama_tied"].make(), "mlp.down_proj")
    loading.save(model, tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    loaded = plain(tmp_path / "out")
    assert (loaded.config.mlp_bias, loaded.config.attention_bias) == (True, False)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_new_bias_without_a_place_is_an_error(tmp_path: Path) -> None:
    loading.save(with_bias(FAMILIES["mistral"].make(), "mlp.down_proj"), tmp_path / "in")
    with pytest.raises(ValueError, match=r"mistral has no place for the bias of .'model.layers.0.mlp.down_proj'"):
        export_dense(tmp_path / "in", tmp_path / "out")


def test_what_is_refused(tmp_path: Path) -> None:
    model = compressed(FAMILIES["llama_tied"].make())
    loading.save(model, tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        export_dense(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "precious"
    model.dequantize().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no model compressed"):
        export_dense(tmp_path / "dense", tmp_path / "new")


def test_a_missing_tensor_leaves_nothing_behind(tmp_path: Path) -> None:
    loading.save(compressed(FAMILIES["llama_tied"].make()), tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.left.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"q_proj'.*missing .'left.weight'"):
        export_dense(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_one_module_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a module is read, no tensor is alive but its own and those of the one just written."""
    loading.save(compressed(FAMILIES["llama_tied"].make()), tmp_path / "in")
    read, alive, most = export._Stored.read, [], []

    def counted(self: Any) -> torch.Tensor:
        tensor = read(self)
        alive.append((self.name.rpartition(".layers.")[2].split(".")[:3], weakref.ref(tensor)))
        most.append(len({tuple(owner) for owner, made in alive if made() is not None}))
        return tensor

    monkeypatch.setattr(export._Stored, "read", counted)
    export_dense(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "in" / "model.safetensors", framework="pt") as opened:
        assert len(most) == len(list(opened.keys())) - 1
    assert max(most) <= 2


def test_conv1d_is_stored_transposed(tmp_path: Path) -> None:
    loading.save(compressed(FAMILIES["gpt2"].make()), tmp_path / "in")
    export_dense(tmp_path / "in", tmp_path / "out")
    loaded = plain(tmp_path / "out")
    assert sum(isinstance(module, Conv1D) for module in loaded.modules()) == 8
