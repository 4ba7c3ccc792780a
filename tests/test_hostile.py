"""Checkpoints made to do harm: names that lead elsewhere, absurd sizes, pickles, code. Each is refused by a message."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import spectrim
from spectrim.model import files, loading, modules
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.export import export_dense
from tests.conftest import save_model
from tests.families import FAMILIES
from tests.model.test_loading import compressed

Q = "model.layers.0.self_attn.q_proj"
LOW_RANK = {"format": "low_rank", "in": 32, "out": 64, "bias": False, "rank": 5}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model directory to be damaged."""
    return save_model(FAMILIES["llama"].make(), tmp_path / "model")


@pytest.fixture
def compressed_dir(tmp_path: Path) -> Path:
    """A compressed model directory to be damaged."""
    spectrim.save(compressed(FAMILIES["llama_tied"].make()), tmp_path / "compressed")
    return tmp_path / "compressed"


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *("../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", "..", ""),
        *("a\0.safetensors", "pytorch_model.bin", "a\n.safetensors", 5, None, ["model.safetensors"]),
    ],
)
def test_an_index_names_plain_safetensors_files_only(name: Any, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "pytorch_model.bin").write_bytes(b"")
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json: the file of 'a' is .*plain name of a \.safetensors file"):
        files.weight_files(inside)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ("[]", "holds a list, not an object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "cannot be read"),
        ("\udcff", "cannot be read"),
    ],
)
def test_an_index_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json.*{message}"):
        files.weight_files(tmp_path)


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(files.JSON_BYTES + 1)
    with pytest.raises(ValueError, match="larger than"):
        files.weight_files(tmp_path)


def test_shards_may_be_links_as_in_a_cache(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").rename(tmp_path / "blob")
    (model_dir / "model.safetensors").symlink_to(tmp_path / "blob")
    assert Checkpoint(model_dir).files == [model_dir / "model.safetensors"]
    (tmp_path / "blob").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        Checkpoint(model_dir)


def test_a_pipe_in_the_place_of_a_file_does_not_block(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    os.mkfifo(model_dir / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        files.weight_files(model_dir)


def header(entry: dict[str, Any]) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header({"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 8]}),
        header({"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}),
        header({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
        header({"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}),
        header({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}),
    ],
)
def test_a_safetensors_header_that_lies(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        files.weight_files(tmp_path)


def test_a_stored_dtype_that_is_not_known(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["more"] = torch.zeros(2, dtype=torch.uint16)
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: the tensor more is stored as U16; known are F64"):
        Checkpoint(model_dir)


def test_pickles_are_never_read(model_dir: Path, tmp_path: Path) -> None:
    """A pickle beside the weights is left alone; alone, it is refused, by our own load too."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> Any:
            return (mark.write_text, ("run",))

    for name in ("pytorch_model.bin", "model.pt"):
        torch.save({"a": Bomb()}, model_dir / name)
    Checkpoint(model_dir)
    spectrim.load(model_dir)
    (model_dir / "model.safetensors").unlink()
    for read in (Checkpoint, spectrim.load):
        with pytest.raises(ValueError, match="safetensors only"):
            read(model_dir)
    assert not mark.exists()


def test_code_in_the_directory_does_not_run_without_trust(model_dir: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("modeling_own", "configuration_own", "tokenization_own", "spectrim_model"):
        code = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('run')\n"
        (model_dir / f"{name}.py").write_text(code, encoding="utf-8")
    auto_map = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit(model_dir, lambda config: config.update(auto_map=auto_map))
    text = json.loads((model_dir / "tokenizer_config.json").read_text())
    text["auto_map"] = {"AutoTokenizer": ["tokenization_own.T", None]}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(text), encoding="utf-8")
    Checkpoint(model_dir)  # its model_type is one that transformers has itself
    spectrim.load(model_dir)
    files.read_tokenizer(model_dir)
    edit(model_dir, lambda config: config.update(model_type="own"))
    for read in (files.read_config, Checkpoint, spectrim.load):
        with pytest.raises(ValueError, match=r"(?s)the configuration cannot be used.*trust_remote_code"):
            read(model_dir)
    assert not mark.exists()
    with pytest.raises(ValueError, match="the configuration cannot be used"):
        files.read_config(model_dir, trust_remote_code=True)
    assert mark.read_text() == "run"  # so the mark would have told


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": [1]},
        {"model_type": 5},
        {"auto_map": [1]},
        {"architectures": 5},
        {"architectures": [5]},
        {"quantization_config": "x"},
        {"quantization_config": [1]},
        {"num_attention_heads": 0},
        {"hidden_size": float("nan")},
        {"hidden_size": "x"},
        {"hidden_size": -32},
        {"dtype": "bogus"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**400},
    ],
)
def test_a_configuration_of_wrong_values(change: dict[str, Any], model_dir: Path) -> None:
    edit(model_dir, lambda config: config.update(change))
    for read in (Checkpoint, spectrim.load):
        with pytest.raises(ValueError, match=f"{model_dir}"):
            read(model_dir)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"a":' * 100_000, "", "null", "\udcff", "1"])
def test_a_configuration_that_is_no_object(text: str, model_dir: Path) -> None:
    (model_dir / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for read in (files.read_config, spectrim.load):
        with pytest.raises(ValueError, match=r"config\.json cannot be read"):
            read(model_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2**30, "num_attention_heads": 2**26}, "more than its files"),
        ({"vocab_size": 2**40}, r"the weight .* is \(1099511627776, 32\) by its config\.json, more than its files"),
        ({"head_dim": 2**40}, "more than its files"),
        ({"num_hidden_layers": 1000}, "1,000 layers by its config.json, but"),
    ],
)
def test_absurd_sizes_of_a_dense_model(change: dict[str, Any], message: str, model_dir: Path) -> None:
    edit(model_dir, lambda config: config.update(change))
    for read in (Checkpoint, spectrim.load):
        with pytest.raises(ValueError, match=message):
            read(model_dir)


HUGE = {"rank": 10**12}
ODD_SPECS: list[tuple[Any, str]] = [
    ({**LOW_RANK, **HUGE}, "do not fit together"),
    ({**LOW_RANK, "in": 10**12, "out": 10**12, **HUGE}, "do not fit together"),
    ({**LOW_RANK, "in": 10**6, "out": 10**6}, r"is \(64, 32\)"),
    ({**LOW_RANK, "rank": float("nan")}, "cannot be nan"),
    ({**LOW_RANK, "rank": 5.0}, r"cannot be 5\.0"),
    ({**LOW_RANK, "rank": True}, "cannot be True"),
    ({**LOW_RANK, "rank": "5"}, "cannot be '5'"),
    ({**LOW_RANK, "rank": None}, "cannot be None"),
    ({**LOW_RANK, "rank": -1}, "cannot be -1"),
    ({**LOW_RANK, "bias": 1}, "cannot be 1"),
    ({**LOW_RANK, "format": ["low_rank"]}, "unknown module format"),
    ({**LOW_RANK, "format": "pivot", "side": "rows", "kept": False}, "'kept'.* cannot be False"),
    ([], "a spec is an object"),
    ("low_rank", "a spec is an object"),
    (None, "a spec is an object"),
]


@pytest.mark.parametrize(("spec", "message"), ODD_SPECS)
def test_odd_specs(spec: Any, message: str, compressed_dir: Path, tmp_path: Path) -> None:
    edit(compressed_dir, lambda config: config["quantization_config"]["layout"].update({Q: spec}))
    for read in (spectrim.load, AutoModelForCausalLM.from_pretrained, lambda path: export_dense(path, tmp_path / "x")):
        with pytest.raises(ValueError, match=f"{Q}.*{message}"):
            read(compressed_dir)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("..", "", ".", "__class__", "model", "model.layers.0", "model.embed_tokens", f"base_{Q}", "x" * 10**5),
        *(f"{Q}.{leaf}" for leaf in ("weight", "left", "__class__")),
        Q.removeprefix("model."),
    ],
)
def test_odd_names(name: str, compressed_dir: Path, tmp_path: Path) -> None:
    edit(compressed_dir, lambda config: config["quantization_config"]["layout"].update({name: LOW_RANK}))
    for read in (spectrim.load, AutoModelForCausalLM.from_pretrained, lambda path: export_dense(path, tmp_path / "x")):
        with pytest.raises(ValueError, match=r"the layout names|not a linear layer|is \(64, 32\)"):
            read(compressed_dir)


@pytest.mark.parametrize("layout", [[], "x", 5, [["a", {}]]])
def test_a_layout_that_is_none(layout: Any, compressed_dir: Path) -> None:
    edit(compressed_dir, lambda config: config["quantization_config"].update(layout=layout))
    for read in (spectrim.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="the layout is an object"):
            read(compressed_dir)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None])
def test_a_format_version_that_is_none(version: Any) -> None:
    with pytest.raises(ValueError, match="format_version is a number from 1 on"):
        loading.SpectrimConfig(layout={}, format_version=version)


def test_absurd_sizes_that_fit_each_other(compressed_dir: Path, tmp_path: Path) -> None:
    """The layout agrees with the configuration, but the files are small: nothing of that size is allocated."""

    def enlarge(config: dict[str, Any]) -> None:
        config["intermediate_size"] = wide = 2**40
        for name, spec in config["quantization_config"]["layout"].items():
            if ".mlp." in name:
                sizes = {"in": wide, "out": spec["out"]} if "down" in name else {"in": spec["in"], "out": wide}
                config["quantization_config"]["layout"][name] = {**LOW_RANK, **sizes, "bias": spec["bias"]}

    edit(compressed_dir, enlarge)
    for read in (spectrim.load, AutoModelForCausalLM.from_pretrained, lambda path: export_dense(path, tmp_path / "x")):
        with pytest.raises(ValueError, match="more than its files"):
            read(compressed_dir)


def test_modules_that_share_a_place_are_refused() -> None:
    one = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": one, "b": one, "c": nn.Sequential(nn.Linear(4, 4))})
    spec = {"format": "low_rank", "in": 4, "out": 4, "bias": True, "rank": 1}
    for layout in ({"a": spec, "b": spec}, {"c": spec, "c.0": spec}):
        with pytest.raises(ValueError, match="which share it"):
            modules.swap(model, layout)
    modules.swap(model, {"c.0": spec})
    with pytest.raises(ValueError, match="which share it"):
        modules.swap(model, {"c.0": spec, "c.0.left": spec})


def test_row_starts_that_rise_only_in_32_bits() -> None:
    """Each step fits int32 if it wraps around; as places in memory they would lie far outside."""
    spec = {"format": "low_rank_sparse", "in": 4, "out": 5, "bias": False, "rank": 0, "nnz": 2, "index": "csr"}
    starts = torch.tensor([0, 2**31 - 1, -(2**31), -1, 0, 2], dtype=torch.int32)
    assert (starts.diff() >= 0).all()
    tensors = {"values": torch.zeros(2), "row_starts": starts, "columns": torch.zeros(2, dtype=torch.int16)}
    with pytest.raises(ValueError, match="row_starts must rise"):
        modules.build(spec, tensors, None)


def test_factors_stored_as_integers(compressed_dir: Path) -> None:
    file, key = compressed_dir / "model.safetensors", f"{Q}.left.weight"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key].to(torch.int32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{Q}.*'left.weight' is torch\.int32, its layout needs torch\.float32"):
        spectrim.load(compressed_dir)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\udcff"])
def test_a_damaged_tokenizer_is_named(name: str, text: str, model_dir: Path) -> None:
    (model_dir / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{model_dir}: the tokenizer cannot be read"):
        files.read_tokenizer(model_dir)
