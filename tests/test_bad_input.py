"""What is wrong is said in one message, before anything heavy, and nothing half done is left behind."""

from __future__ import annotations

import errno
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import spectrim
from spectrim.core.store import StoreError
from spectrim.model import writer
from spectrim.recipe import RecipeError
from tests.conftest import letters, save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model directory to be damaged."""
    return save_model(FAMILIES["llama"].make(), tmp_path / "model")


def compress(directory: Path | str, out: Path, **options: Any) -> spectrim.Result:
    return spectrim.compress(directory, **{"recipe": "whitened", "text": CALIBRATION, "out": out, **options})


def refused(out: Path, directory: Path | str, message: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    """The run fails with the message, and leaves neither an output nor a temporary directory."""
    with pytest.raises(kind, match=message):
        compress(directory, out, **options)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "some/where/else"])
def test_no_such_model(name: str, tmp_path: Path) -> None:
    refused(tmp_path / "out", name, f"no such model directory: {name}")


def test_a_name_that_the_hub_cannot_give(tmp_path: Path) -> None:
    refused(tmp_path / "out", "nobody/nothing", "is no directory here and could not be had from the hub")


def test_a_directory_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "out", tmp_path / "empty", r"holds no config\.json")


def test_a_configuration_that_cannot_be_read(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "config.json").write_text("{", encoding="utf-8")
    refused(tmp_path / "out", model_dir, r"config\.json cannot be read")
    (model_dir / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")
    refused(tmp_path / "out", model_dir, "the configuration cannot be used.*unheard_of")


def test_no_such_text(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text(letters(99), encoding="utf-8")
    name = str(tmp_path / "story.txt")
    refused(tmp_path / "out", llama_dir, rf"no such file: {name}; nearest in .*stories\.txt", text=name)


def test_a_text_shorter_than_one_window(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(letters(20), encoding="utf-8")
    options: dict[str, Any] = {"text": str(tmp_path / "short.txt"), "sequences": 1, "length": 24}
    refused(tmp_path / "out", llama_dir, "1 sequences of 24 tokens need 24 tokens, it has 21", **options)


def test_no_text_where_the_recipe_measures(llama_dir: Path, tmp_path: Path) -> None:
    refused(tmp_path / "out", llama_dir, r"measures Gram\(\) on calibration text: give --text FILE", text=None)


def test_a_model_directory_without_tokenizer(tmp_path: Path, text_file: Path) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"text": str(text_file), "sequences": 1, "length": 24}
    refused(tmp_path / "out", tmp_path / "model", "tokenizer", **options)


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    refused(tmp_path / "out", tmp_path / "encoder", "BertModel.*not a causal language model")


def test_an_encoder_decoder_is_no_causal_language_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    refused(
        tmp_path / "out", tmp_path / "t5", "t5 model .T5ForConditionalGeneration., which is not a causal language model"
    )


NAN = {
    "a target": "model.layers.1.mlp.up_proj.weight",
    "a norm": "model.layers.1.input_layernorm.weight",
    "a bias": "model.layers.0.self_attn.q_proj.bias",
    "the embedding": "model.embed_tokens.weight",
    "the last norm": "model.norm.weight",
    "the head": "lm_head.weight",
}


@pytest.mark.parametrize(
    ("where", "recipe"),
    [*((where, "whitened") for where in NAN), *((w, r) for w in ("a target", "the head") for r in ("svd", "fwsvd"))],
)
def test_weights_that_are_not_finite_are_named(where: str, recipe: str, model_dir: Path, tmp_path: Path) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    tensors[NAN[where]].view(-1)[5:8] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    message = rf"the weight {NAN[where]} holds 3 values that are not finite"
    refused(tmp_path / "out", model_dir, message, recipe=recipe)


@pytest.mark.parametrize("recipe", ["whitened", "fwsvd"])
@pytest.mark.parametrize("where", ["a target", "the head"])
def test_a_live_model_with_weights_that_are_not_finite_is_left_alone(where: str, recipe: str) -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        model.get_parameter(NAN[where]).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match=f"the weight {NAN[where]} holds 1 values that are not finite"):
        spectrim.compress(model, recipe, text=CALIBRATION)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("shards", [False, True])
def test_a_truncated_file_is_named(shards: bool, tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"].make(), tmp_path / "model", max_shard_size="20KB" if shards else "1GB")
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path / "out", directory, f"{file.name} is truncated or damaged")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = save_model(FAMILIES["llama"].make(), tmp_path / "model", max_shard_size="20KB")
    file = sorted(directory.glob("*.safetensors"))[1]
    file.unlink()
    refused(tmp_path / "out", directory, f"{file.name} is missing")


def test_a_pickled_checkpoint_is_refused(model_dir: Path, tmp_path: Path) -> None:
    torch.save(load_file(model_dir / "model.safetensors"), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()
    refused(tmp_path / "out", model_dir, r"safetensors only \(convert pickled \.bin weights")


def test_a_missing_tensor_is_named(model_dir: Path, tmp_path: Path) -> None:
    file, name = model_dir / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    for recipe in ("whitened", "svd"):
        refused(tmp_path / "out", model_dir, f"no tensor for {name}", recipe=recipe)


def test_a_tensor_of_another_shape_is_named(model_dir: Path, tmp_path: Path) -> None:
    file, name = model_dir / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(file), name: torch.zeros(40, 32)}, file, metadata={"format": "pt"})
    for recipe in ("whitened", "svd"):
        refused(tmp_path / "out", model_dir, rf"{name} is \(40, 32\) in the checkpoint, \(48, 32\) by", recipe=recipe)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_its_range(ratio: float, llama_dir: Path, tmp_path: Path) -> None:
    refused(tmp_path / "out", llama_dir, r"groups\.0\.ratio: .*, given", RecipeError, ratio=ratio)


def test_the_largest_possible_ratio_is_named_and_possible(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="largest possible ratio here is") as raised:
        compress(llama_dir, tmp_path / "out", ratio=0.97)
    largest = float(str(raised.value).split()[-1])
    assert 0.5 < largest < 0.97
    result = compress(llama_dir, tmp_path / "out", ratio=largest)
    assert {choice.counts["rank"] for choice in result.plan.choices.values()} == {1}
    refused(tmp_path / "other", llama_dir, "largest possible ratio", RecipeError, ratio=largest + 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibrate.sequence=3", r"unknown key calibrate\.sequence: did you mean 'sequences'\?"),
        ("grops=[]", r"unknown key grops: did you mean 'groups'\?"),
        ("groups.0.ration=0.1", r"unknown key groups\.0\.ration: did you mean 'ratio'\?"),
        ("groups.0.decompose.method=whitend_svd", r"unknown decomposer 'whitend_svd': did you mean 'whitened_svd'\?"),
        ("groups.0.allocate.method=unifrom", r"unknown allocator 'unifrom': did you mean 'uniform'\?"),
        ("groups.0.allocate.multipl=8", r"has no setting 'multipl': did you mean 'multiple'\?"),
        ("groups.0.allocate.multiple=many", r"setting multiple: .*given 'many'"),
        ("groups.0.allocate.multiple=0", "multiple is 0"),
        ("groups.0.format=dense", r"groups\.0\.format: .*given 'dense'"),
        ("groups.0.match=nothing", "has no target here; roles present: down, ffn, gate, k, o, q, up, v"),
        ("groups.3.ratio=0.1", "'3' is no index of a list of 1"),
        ("calibrate.sequences=0", r"calibrate\.sequences: .*given 0"),
    ],
)
def test_a_wrong_recipe_names_the_key_and_the_nearest(
    change: str, message: str, llama_dir: Path, tmp_path: Path
) -> None:
    refused(tmp_path / "out", llama_dir, message, RecipeError, settings=[change])
    assert not list(tmp_path.iterdir())


def test_recipes_that_are_none(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(out, llama_dir, "unknown recipe 'whitned': did you mean 'whitened'", RecipeError, recipe="whitned")
    refused(out, llama_dir, "no such recipe file", RecipeError, recipe=str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("groups: [", encoding="utf-8")
    refused(out, llama_dir, "is no YAML", RecipeError, recipe=str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    refused(out, llama_dir, "a recipe is a mapping", RecipeError, recipe=str(tmp_path / "list.yaml"))
    twice = "groups: [{decompose: {method: svd}}, {match: q, decompose: {method: svd}}]"
    (tmp_path / "twice.yaml").write_text(twice, encoding="utf-8")
    refused(
        out,
        llama_dir,
        "q_proj is in two groups: groups.0 and groups.1",
        RecipeError,
        recipe=str(tmp_path / "twice.yaml"),
    )


def test_a_filled_output_is_refused_untouched_or_replaced_whole(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty; nothing was changed"):
        compress(llama_dir, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    compress(llama_dir, out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]


def test_an_output_inside_nothing_is_made(llama_dir: Path, tmp_path: Path) -> None:
    compress(llama_dir, tmp_path / "a" / "b" / "out", recipe="svd")
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").exists()


def disk_full(self: Any, data: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(self: Any, data: Any) -> int:
    raise KeyboardInterrupt


def failing(write: Callable[[Any, Any], int], after: int) -> Callable[..., Any]:
    """`open`, but files for binary writing give out after some bytes."""

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > after:
                super().write(bytes(data)[: max(0, after - self.tell())])
                return write(self, data)
            return super().write(data)

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return File(path, mode) if mode == "wb" else open(path, mode, *rest, **options)

    return opened


@pytest.mark.parametrize("write", [disk_full, interrupted])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_while_writing_leaves_no_half_output(
    write: Callable[[Any, Any], int], old: bool, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if old:
        compress(llama_dir, out, recipe="svd")
    before = tree_hash(out) if old else {}
    monkeypatch.setattr(writer, "open", failing(write, after=20_000), raising=False)
    with pytest.raises((OSError, KeyboardInterrupt)) as raised:
        compress(llama_dir, out, overwrite=old)
    if raised.type is not KeyboardInterrupt:
        assert f"cannot write {out}: No space left on device; free some space or give another" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "out.work"] if old else ["out.work"])
    assert tree_hash(out) == before if old else not out.exists()
    monkeypatch.undo()
    compress(llama_dir, out, overwrite=old)
    assert tree_hash(out) != before and (out / "model.safetensors").exists()


def test_a_failure_in_the_work_directory_leaves_no_half_artifact(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrim.core import store

    original, count = store.save_file, 0

    def full(tensors: Any, path: Path, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left.*--work"):
        compress(llama_dir, tmp_path / "out", recipe="svd")
    kept = [path.name for path in (tmp_path / "out.work").rglob("*") if path.is_file()]
    assert len(kept) == 3 and all(name.endswith(".safetensors") and not name.startswith(".") for name in kept)


@pytest.mark.parametrize("bit", [False, True])
def test_a_damaged_artifact_is_named_and_made_again(
    bit: bool, llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut short, or with one bit flipped in the last of its numbers."""
    compress(llama_dir, tmp_path / "out", recipe="svd")
    before = tree_hash(tmp_path, "run.json")
    artifact = sorted((tmp_path / "out.work" / "candidate").iterdir())[0]
    content = artifact.read_bytes()
    artifact.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if bit else content[:-10])
    compress(llama_dir, tmp_path / "out", recipe="svd", overwrite=True)
    assert f"{artifact} is damaged" in caplog.text
    assert tree_hash(tmp_path, "run.json") == before


def test_a_work_directory_that_cannot_be_made(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(tmp_path / "out", llama_dir, "give another with --work", StoreError, work=tmp_path / "file")


@pytest.fixture
def compressed(llama_dir: Path, tmp_path: Path) -> Path:
    """A compressed model directory to be damaged."""
    compress(llama_dir, tmp_path / "compressed", recipe="svd")
    return tmp_path / "compressed"


def edit_entry(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_layout_that_names_a_module_the_model_lacks(compressed: Path) -> None:
    def rename(entry: dict[str, Any]) -> None:
        entry["layout"]["model.layers.9.mlp.up_proj"] = entry["layout"]["model.layers.1.mlp.up_proj"]

    edit_entry(compressed, rename)
    for load in (spectrim.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"the layout names the module 'model\.layers\.9\.mlp\.up_proj'"):
            load(compressed)


def test_a_layout_whose_shape_does_not_fit(compressed: Path) -> None:
    edit_entry(compressed, lambda entry: entry["layout"]["model.layers.1.mlp.up_proj"].update(out=40))
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' is \(48, 32\)"):
        spectrim.load(compressed)


def test_a_newer_format_version(compressed: Path) -> None:
    edit_entry(compressed, lambda entry: entry.update(format_version=2))
    for load in (spectrim.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"format_version 2.*install a newer release of spectrim"):
            load(compressed)


def test_a_compressed_model_is_not_compressed_again(compressed: Path, tmp_path: Path) -> None:
    refused(tmp_path / "out", compressed, r"compressed already \(quant_method spectrim\)")


def test_windows_that_are_no_windows_of_this_model(llama_dir: Path, tmp_path: Path) -> None:
    too_long = torch.ones(2, 49, dtype=torch.int64)
    refused(tmp_path / "out", llama_dir, "49.*48 positions", text=too_long)
    unknown = torch.full((2, 24), VOCABULARY)
    refused(tmp_path / "out", llama_dir, f"token {VOCABULARY}.*vocabulary of {VOCABULARY}", text=unknown)
    refused(tmp_path / "out", llama_dir, "no calibration windows", text=torch.ones(0, 24, dtype=torch.int64))


def test_nothing_is_logged_as_an_error_on_the_good_path(
    llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        compress(llama_dir, tmp_path / "out")
        spectrim.load(tmp_path / "out")
    assert caplog.records == []
