"""Saving and the three ways of loading, with equal logits; what must fail, fails and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import spectrim
from spectrim.model import loading, modules, quantizer
from spectrim.model.export import export_dense
from tests.families import FAMILIES, linears
from tests.model.test_modules import built

SOURCE = str(Path(spectrim.__file__).parents[1])
TOKENS = torch.arange(1, 21).view(2, 10)


def block_list(model: PreTrainedModel) -> str:
    """The name of the list of blocks."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


SIZES: list[dict[str, Any]] = [
    {"format": "low_rank", "rank": 5},
    {"format": "pivot", "rank": 4, "side": "rows"},
    {"format": "pivot", "rank": 4, "side": "columns", "kept": 3},
    {"format": "low_rank_sparse", "rank": 3, "nnz": 60, "index": "csr"},
    {"format": "pivot_sparse", "rank": 3, "nnz": 60, "index": "mask"},
    {"format": "low_rank_columns", "rank": 4, "kept": 5},
]
WITH_RANK_0: list[dict[str, Any]] = [*SIZES, {"format": "low_rank", "rank": 0}]


def compressed(model: PreTrainedModel, sizes: list[dict[str, Any]] = WITH_RANK_0) -> PreTrainedModel:
    """Every linear of the blocks in another format, with random tensors; the format follows from its place."""
    layout = {}
    for place, (name, old) in enumerate(linears(model, block_list(model)).items()):
        rows, width = old.weight.shape if isinstance(old, nn.Linear) else reversed(old.weight.shape)
        bias = old.bias is not None
        layout[name] = modules.checked({"in": width, "out": rows, "bias": bias, **sizes[place % len(sizes)]})
        model.set_submodule(name, built(layout[name], seed=place))
    loading.attach(model, layout)
    return model.eval()


def narrow(model: PreTrainedModel, widths: Mapping[int, int]) -> PreTrainedModel:
    """The FFNs of some blocks of a Llama with fewer channels."""
    layout = {}
    for block, width in widths.items():
        for leaf, rows in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
            name = f"model.layers.{block}.mlp.{leaf}"
            old = model.get_submodule(name)
            weight = old.weight[:width] if rows else old.weight[:, :width]
            spec = {"format": "dense", "in": weight.shape[1], "out": weight.shape[0], "bias": old.bias is not None}
            bias = old.bias if old.bias is None or not rows else old.bias[:width]
            model.set_submodule(name, modules.build(spec, {"weight": weight}, bias))
            layout[name] = spec
    loading.attach(model, layout)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Tied embeddings, grouped-query attention, every format."""
    return compressed(FAMILIES["llama_tied"].make())


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "compressed"
    loading.save(model, directory)
    torch.save(logits(model), directory.parent / "logits.pt")
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copied")
    return tmp_path / "copied"


def change(directory: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace or remove tensors of a checkpoint."""
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def script(code: str, home: Path, *arguments: object, package: bool) -> dict[str, Any]:
    """Run code in a fresh interpreter, with the package or with a block on it; what it prints last, as JSON."""
    before = f"import sys; sys.path.insert(0, {SOURCE!r})\n" if package else BLOCK
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-W", "error", "-c", before + PREPARE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spectrim":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
PREPARE = """
import json

def difference(directory, wanted, **options):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    except Exception as error:
        return type(error).__name__
    found = model(torch.arange(1, 21).view(2, 10)).logits
    difference.last = model
    return (found - torch.load(wanted)).abs().max().item()
"""


def test_without_the_package(saved: Path, tmp_path: Path) -> None:
    """With trust the code file loads it; a dense export needs nothing; else it fails, not loads at random."""
    expected = saved.parent / "logits.pt"
    export_dense(saved, tmp_path / "dense")
    loading.load(saved).save_pretrained(tmp_path / "plain")
    code = """
saved, plain, dense, again, wanted = sys.argv[1:]
result = {"no trust": difference(saved, wanted), "plain save, no trust": difference(plain, wanted)}
result["dense"] = difference(dense, wanted)
result["trust"] = difference(saved, wanted, trust_remote_code=True)
result["class"] = type(difference.last).__name__
difference.last.save_pretrained(again)
result["saved again"] = difference(again, wanted, trust_remote_code=True)
result["no trust after trust"] = difference(again, wanted)  # the code file has registered by now
result["ours"] = [name for name in sys.modules if name.partition(".")[0] == "spectrim"]
print(json.dumps(result))
"""
    again = tmp_path / "again"
    found = script(code, tmp_path, saved, tmp_path / "plain", tmp_path / "dense", again, expected, package=False)
    assert found.pop("dense") == pytest.approx(0, abs=1e-4)
    assert found == {
        "no trust": "RuntimeError",
        "plain save, no trust": "RuntimeError",
        "trust": 0.0,
        "class": "LlamaForCausalLM",
        "saved again": 0.0,
        "no trust after trust": 0.0,
        "ours": [],
    }
    assert (again / "spectrim_model.py").read_text() == (saved / "spectrim_model.py").read_text()


def test_with_the_package_imported_first(saved: Path, tmp_path: Path) -> None:
    """`install` alone imports nothing heavy; then plain loading works, and trust changes nothing."""
    code = """
from spectrim.model.hook import install
install()
install()
finders = lambda: [type(finder).__module__ for finder in sys.meta_path].count("spectrim.model.hook")
result = {"heavy": [name for name in ("torch", "transformers") if name in sys.modules], "finders": [finders()]}
saved, wanted, again = sys.argv[1:]
result["plain"] = difference(saved, wanted)
result["trust"] = difference(saved, wanted, trust_remote_code=True)
from spectrim.model import loading
loading.save(difference.last, again)
result["finders"].append(finders())
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
result["from"] = AUTO_QUANTIZER_MAPPING["spectrim"].__module__
print(json.dumps(result))
"""
    found = script(code, tmp_path, saved, saved.parent / "logits.pt", tmp_path / "again", package=True)
    assert found == {"heavy": [], "plain": 0.0, "trust": 0.0, "finders": [1, 0], "from": "spectrim.model.quantizer"}
    for name in ("config.json", "spectrim_model.py", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_with_the_package_imported_last(tmp_path: Path) -> None:
    code = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
before = "spectrim" in AUTO_QUANTIZER_MAPPING
import spectrim
tables = (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
print(json.dumps({"before": before, "after": [table["spectrim"].__name__ for table in tables]}))
"""
    found = script(code, tmp_path, package=True)
    assert found == {"before": False, "after": ["SpectrimConfig", "SpectrimQuantizer"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    model = compressed(FAMILIES[family].make())
    loading.save(model, tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    assert torch.equal(logits(loading.load(tmp_path / "one")), logits(model))


def test_saving_and_loading_in_turn(model: PreTrainedModel, saved: Path, tmp_path: Path) -> None:
    """By our `save` and by plain `save_pretrained`, whose checkpoint names no code file that is not there."""
    loading.save(loading.load(saved), tmp_path / "second")
    for name in ("config.json", "spectrim_model.py", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (saved / name).read_bytes()
    loading.load(tmp_path / "second").save_pretrained(tmp_path / "third")
    config = json.loads((tmp_path / "third" / "config.json").read_text())
    assert "auto_map" not in config
    assert not (tmp_path / "third" / "spectrim_model.py").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "third")), logits(model))


def test_config_layout_and_guard(model: PreTrainedModel, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    layout = loading.read_layout(saved)
    assert config["quantization_config"] == {"quant_method": "spectrim", "format_version": 1, "layout": layout}
    assert config["auto_map"] == {
        "AutoConfig": "spectrim_model.LlamaConfig",
        "AutoModelForCausalLM": "spectrim_model.LlamaForCausalLM",
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert layout == {name: found for name, m in model.named_modules() if (found := modules.spec_of(m))}
    guard = min(layout) + ".weight"
    with safe_open(saved / "model.safetensors", framework="pt") as opened:
        assert opened.get_slice(guard).get_shape() == [0]
        assert set(opened.keys()) - {guard} == set(model.state_dict()) - {"lm_head.weight"}
    assert guard not in model.state_dict()
    assert loading.is_compressed(saved)


def test_guard_name() -> None:
    dense, other = {"format": "dense"}, {"format": "pivot"}
    assert quantizer.guard_name({"b": other, "a": dense, "c": other}) == "b"
    assert quantizer.guard_name({"a": dense}) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_other_dtypes(model: PreTrainedModel, saved: Path, dtype: torch.dtype | str) -> None:
    loaded = loading.load(saved, dtype=dtype, device_map="cpu")
    wanted = torch.float32 if dtype == "auto" else dtype
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert {t.dtype for t in loaded.state_dict().values()} == {wanted, torch.int32, torch.int16, torch.uint8}
    torch.testing.assert_close(logits(loaded).float(), logits(model), atol=0.3, rtol=0.1)


def test_narrow_ffns(tmp_path: Path) -> None:
    """`dense` modules alone need no guard: their size stops code that knows nothing of them."""
    model = narrow(FAMILIES["llama"].make(), {1: 17})
    loading.save(model, tmp_path)
    assert torch.equal(logits(loading.load(tmp_path)), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_version(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 2, "later": {}}
    (copied / "config.json").write_text(json.dumps(config))
    for read in (loading.load, loading.read_layout):
        with pytest.raises(ValueError, match=r"format_version 2.*up to version 1.*one that reads version 2"):
            read(copied)


Q = "model.layers.0.self_attn.q_proj"  # low_rank
K = "model.layers.0.self_attn.k_proj"  # pivot


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("model.layers.7.mlp", {"format": "low_rank", "in": 32, "out": 64, "bias": False, "rank": 5}, "layers.7.mlp"),
        (Q, {"format": "low_rank", "in": 16, "out": 64, "bias": False, "rank": 5}, f"{Q}.*64, 32.*64, 16"),
        (Q, {"format": "low_rank", "in": 32, "out": 64, "bias": False, "rank": 6}, rf"{Q}.*left.weight.*\(64, 5\)"),
        (Q, {"format": "low_rank", "in": 32, "out": 64, "bias": True, "rank": 5}, f"{Q}.*lacks .'bias'"),
        (Q, {"format": "wavelet"}, f"{Q}.*unknown module format"),
    ],
)
def test_a_layout_that_does_not_fit(copied: Path, name: str, spec: dict[str, Any], message: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["layout"][name] = spec
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        loading.load(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.left.weight": None}, f"{Q}.*lacks .'left.weight'"),
        ({f"{K}.order": None}, f"{K}.*lacks .'order'"),
        ({f"{Q}.left.weight": torch.zeros(64, 4)}, rf"{Q}.*'left.weight' has the shape \(64, 4\).*\(64, 5\)"),
        ({f"{K}.order": torch.zeros(32, dtype=torch.int32)}, f"{K}.*'order' must be distinct"),
    ],
)
def test_tensors_that_do_not_fit(copied: Path, changes: dict[str, Tensor | None], message: str) -> None:
    change(copied, changes)
    with pytest.raises(ValueError, match=message):
        loading.load(copied)
    with pytest.raises(ValueError, match=message):
        loading.load(copied, ignore_mismatched_sizes=True)


def test_attach_names_what_is_not_so() -> None:
    model = compressed(FAMILIES["llama_tied"].make())
    layout = model.hf_quantizer.layout
    with pytest.raises(ValueError, match=f"{Q}.*'rank': 9"):
        loading.attach(model, {**layout, Q: {**layout[Q], "rank": 9}})
    with pytest.raises(ValueError, match=r"nowhere.*not in the model"):
        loading.attach(model, {**layout, "nowhere": layout[Q]})
    with pytest.raises(ValueError, match=r"lm_head.*None"):
        loading.attach(model, {**layout, "lm_head": layout[Q]})


def test_what_cannot_be_saved_or_read(model: PreTrainedModel, tmp_path: Path) -> None:
    plain = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match="no layout"):
        loading.save(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="push_to_hub"):
        loading.save(model, tmp_path / "pushed", push_to_hub=True)
    plain.save_pretrained(tmp_path / "plain")
    assert not loading.is_compressed(tmp_path / "plain")
    with pytest.raises(ValueError, match="no model compressed"):
        loading.read_layout(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no config\.json"):
        loading.is_compressed(tmp_path)
    with pytest.raises(ValueError, match=r"unknown keys .'more'"):
        quantizer.SpectrimConfig(more=1)


class OwnConfig(LlamaConfig):
    """A class that transformers does not export."""


class OwnModel(LlamaForCausalLM):
    """A class that transformers does not export."""

    config_class = OwnConfig


def test_write_config(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = loading.read_layout(saved)
    data = json.loads((saved / "config.json").read_text())
    (tmp_path / "native").mkdir()
    others = {"AutoTokenizer": ["own.Slow", None], "AutoModel": "modeling_own.Base"}
    loading.write_config(tmp_path / "native", {**data, "auto_map": others}, layout, LlamaConfig, LlamaForCausalLM)
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    assert written["auto_map"] == {**data["auto_map"], "AutoTokenizer": ["own.Slow", None]}
    (tmp_path / "own").mkdir()
    loading.write_config(tmp_path / "own", {**data, "auto_map": others}, layout, OwnConfig, OwnModel)
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert written["auto_map"] == others
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["config.json"]
    assert "OwnModel is not part of transformers" in caplog.text


def test_the_code_file_imports_torch_and_transformers_only(saved: Path) -> None:
    text = (saved / "spectrim_model.py").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    packages = {line.split()[1].partition(".")[0] for line in lines}
    assert packages - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_registering_again_keeps_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    table = quantizer.AUTO_QUANTIZER_MAPPING
    known = table["spectrim"]
    quantizer.register()
    assert table["spectrim"] is known
    monkeypatch.setitem(table, "spectrim", type("Older", (), {"format_version": 0}))
    monkeypatch.setitem(quantizer.AUTO_QUANTIZATION_CONFIG_MAPPING, "spectrim", object)
    quantizer.register()
    assert table["spectrim"] is quantizer.SpectrimQuantizer
    assert quantizer.AUTO_QUANTIZATION_CONFIG_MAPPING["spectrim"] is quantizer.SpectrimConfig
