"""Reading a checkpoint a module at a time gives what transformers loads, and says what is wrong with a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.model import checkpoint, files, targets
from spectrim.model.checkpoint import Checkpoint, LiveModel
from tests.families import FAMILIES, LAYERS

CPU = torch.device("cpu")
HEAD = "lm_head.weight"


def real(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that hold values."""
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


def assert_equal(model: PreTrainedModel, expected: dict[str, Tensor], names: set[str]) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        torch.testing.assert_close(parameters[name].detach(), expected[name], rtol=0, atol=0, msg=name)


def edit(directory: Path, changes: dict[str, Tensor | None], file: str = "model.safetensors") -> None:
    """Replace tensors of a file, or take them out (None)."""
    tensors = {**load_file(directory / file), **changes}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_each_part_is_loaded_as_transformers_loads_it_and_freed_again(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = {key: parameter.detach() for key, parameter in loaded.named_parameters()}
    buffers = dict(loaded.named_buffers())
    source = Checkpoint(tmp_path)
    structure = targets.find(source.model)
    assert real(source.model) == set()
    for index in range(LAYERS):
        prefix = structure.block(index)
        source.load(prefix, CPU)
        inside = {key for key in expected if key.startswith(f"{prefix}.")}
        assert real(source.model) == inside
        assert_equal(source.model, expected, inside)
        source.release(prefix)
        assert real(source.model) == set()
    names = source.load_outside(structure.blocks, CPU)
    outside = {key for key in expected if not key.startswith(f"{structure.blocks}.")}
    # an output head of its own is not needed: what follows the blocks is never run
    wanted = (
        outside if FAMILIES[name].tied else {key for key in outside if "lm_head" not in key and "embed_out" not in key}
    )
    assert real(source.model) == wanted
    assert FAMILIES[name].tied or wanted < outside
    assert_equal(source.model, expected, wanted)
    for key, buffer in source.model.named_buffers():
        torch.testing.assert_close(buffer, buffers[key], rtol=0, atol=0)
    source.release_names(names)
    assert real(source.model) == set()


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = Checkpoint(tmp_path)
    source.load("model.layers.1", CPU)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.model.get_parameter(name), model.get_parameter(name))
    assert torch.equal(source.read(name), model.get_parameter(name))


def test_stored_and_computing_dtype_are_apart(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path, torch.float32)
    assert source.stored_dtype == torch.bfloat16
    source.load("model.layers.0", CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.model.get_parameter(name).dtype == torch.float32
    assert torch.equal(source.model.get_parameter(name), model.get_parameter(name).float())
    assert source.read(name).dtype == torch.bfloat16
    assert source.dtype_of(source.stored_key(name)) == torch.bfloat16
    assert Checkpoint(tmp_path).model.dtype == torch.bfloat16


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As the first checkpoints of GPT-2 have them, buffers of old code among them."""
    model = FAMILIES["gpt2"].make()
    model.save_pretrained(tmp_path)
    tensors = {
        key.removeprefix("transformer."): tensor for key, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert source.stored_key(name) == "h.1.mlp.c_fc.weight"
    source.load("transformer.h.1", CPU)
    assert torch.equal(source.model.get_parameter(name), model.get_parameter(name))
    assert torch.equal(source.read(name), model.get_parameter(name))


def test_tensors_that_go_together_into_one_parameter_have_no_key_of_their_own(tmp_path: Path) -> None:
    FAMILIES["mixtral"].make().save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    experts = [key for key in source.where if ".experts." in key]
    assert len(experts) > 4 and set(experts) <= source.converted
    with pytest.raises(ValueError, match=r"no tensor for .*experts"):
        source.stored_key(source.names[experts[0]])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path)
    edit(tmp_path, {"model.layers.1.mlp.up_proj.weight": None})
    source = Checkpoint(tmp_path)
    source.load("model.layers.0", CPU)
    with pytest.raises(ValueError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        source.load("model.layers.1", CPU)
    with pytest.raises(ValueError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        source.read("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4:6] = value
        model.model.embed_tokens.weight[1, 1] = value
    model.save_pretrained(tmp_path)
    message = r"weight model\.layers\.1\.mlp\.up_proj\.weight holds 2 values that are not finite"
    source = Checkpoint(tmp_path)
    source.load("model.layers.0", CPU)
    with pytest.raises(ValueError, match=message):
        source.load("model.layers.1", CPU)
    with pytest.raises(ValueError, match=message):
        source.read("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"weight model\.embed_tokens\.weight holds 1 values"):
        source.whole(CPU)
    with pytest.raises(ValueError, match=r"weight model\.embed_tokens\.weight holds 1 values"):
        LiveModel(model)
    with pytest.raises(ValueError, match=r"weight model\.embed_tokens\.weight holds 1 values"):
        Checkpoint(tmp_path).load_outside("model.layers", CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_told_whatever_the_sum_is(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert checkpoint._finite(torch.tensor([], dtype=dtype))
    assert checkpoint._finite(torch.full((9,), largest, dtype=dtype))
    assert checkpoint._finite(torch.full((9,), -largest, dtype=dtype))
    assert not checkpoint._finite(torch.tensor([1.0, float("inf"), -float("inf")], dtype=dtype))
    assert not checkpoint._finite(torch.tensor([1.0, float("nan")], dtype=dtype))


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    model = FAMILIES["llama"].make()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"lm_head\.weight is not in memory \(offloaded\)"):
        LiveModel(model)


def test_experts_of_another_shape_are_named(tmp_path: Path) -> None:
    FAMILIES["mixtral"].make().save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / "model.safetensors") if ".0." in key and key.endswith("w2.weight")]
    edit(tmp_path, {key: torch.zeros(32, 40) for key in keys})
    source = Checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"weight model\.layers\.0\.mlp\.experts\.down_proj is .*40\) in the checkpoint"
    ):
        source.load("model.layers.0", CPU)


def test_the_fingerprint_follows_weights_and_configuration(tmp_path: Path) -> None:
    def written(seed: int, **changes: object) -> Path:
        directory = tmp_path / f"{seed}{changes}"
        FAMILIES["llama"].make(seed, **changes).save_pretrained(directory)
        return directory

    first = Checkpoint(written(0)).fingerprint()
    assert first == Checkpoint(tmp_path / "0{}").fingerprint()
    assert (
        len({first, Checkpoint(written(1)).fingerprint(), Checkpoint(written(0, rms_norm_eps=0.1)).fingerprint()}) == 3
    )
    live, other = FAMILIES["llama"].make(0), FAMILIES["llama"].make(0)
    assert LiveModel(live).fingerprint() == LiveModel(other).fingerprint()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    assert LiveModel(live).fingerprint() != LiveModel(other).fingerprint()


def test_a_live_model_is_never_emptied() -> None:
    model = FAMILIES["llama"].make()
    source = LiveModel(model)
    source.load("model.layers.0", CPU)
    source.release_names(source.load_outside("model.layers", CPU))
    source.release("model.layers.0")
    assert real(model) == {name for name, _ in model.named_parameters()}
    assert torch.equal(source.read(HEAD), model.lm_head.weight)
    assert not source.read(HEAD).requires_grad


def test_where_a_model_is_looked_for(tmp_path: Path, llama_dir: Path) -> None:
    assert files.resolve(str(llama_dir)) == llama_dir
    assert (files.resolve("reference") / "config.json").is_file()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        files.resolve(str(tmp_path))
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(ValueError, match="no such model directory"):
            files.resolve(name)
    with pytest.raises(ValueError, match="nobody/nothing is no directory here and could not be had from the hub"):
        files.resolve("nobody/nothing")


def test_a_file_of_the_index_that_is_not_there_is_named(tmp_path: Path) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path, max_shard_size="40KB")
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    last = sorted(names)[-1]
    (tmp_path / last).unlink()
    with pytest.raises(ValueError, match=f"{last} is missing"):
        Checkpoint(tmp_path)


def test_a_checkpoint_without_floating_point_tensors_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no floating-point tensor"):
        Checkpoint(tmp_path)


def test_a_compressed_model_is_not_compressed_again(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    spectrim.compress(model, "svd", ratio=0.3)
    spectrim.save(model, tmp_path)
    for make in (lambda: Checkpoint(tmp_path), lambda: LiveModel(model)):
        with pytest.raises(ValueError, match=r"is compressed already \(quant_method spectrim\).*export --format dense"):
            make()
