"""Readers of files that others wrote, on data nobody meant: only the documented errors come out, with a message."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrim import recipe
from spectrim.core.plan import Plan
from spectrim.model import files, loading, modules, quantizer
from spectrim.model.checkpoint import Checkpoint
from spectrim.recipe import RecipeError

few = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)


def nested(words: list[str], leaves: st.SearchStrategy[Any] = scalars) -> st.SearchStrategy[Any]:
    """JSON data whose keys and strings are often words that mean something."""
    names = st.sampled_from(words) | st.text(max_size=6)
    return st.recursive(
        leaves | names,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5),
        max_leaves=12,
    )


@contextmanager
def documented(kind: type[Exception] = ValueError) -> Iterator[None]:
    """All may go well, or end in an error of this kind that says something."""
    try:
        yield
    except kind as error:
        assert str(error).strip()


RECIPE = ["calibrate", "groups", "about", "sequences", "length", "seed", "batch", "sequential", "match", "ratio"]
RECIPE += ["format", "decompose", "allocate", "method", "svd", "whitened_svd", "uniform", "unirank", "plain", "pivot"]
RECIPE += ["multiple", "alpha", "*", "q", "ffn"]
groups = st.fixed_dictionaries(
    {"decompose": nested(RECIPE)},
    optional={"allocate": nested(RECIPE), "ratio": scalars, "match": nested(RECIPE), "format": scalars},
)
recipes = st.fixed_dictionaries(
    {"groups": st.lists(groups, max_size=2) | nested(RECIPE)}, optional={"calibrate": nested(RECIPE), "about": scalars}
)


@few
@given(recipes | st.dictionaries(st.sampled_from(RECIPE), nested(RECIPE)))
def test_recipe_data(data: Any) -> None:
    with documented(RecipeError):
        recipe.validated(data, "fuzzed")


paths = st.lists(st.sampled_from([*RECIPE, "0", "1", "²", "-1", "9" * 30, ""]), min_size=1, max_size=4).map(".".join)


@few
@given(recipes, st.lists(st.tuples(paths, st.text(max_size=10) | nested(RECIPE).map(json.dumps)), max_size=3))
def test_recipe_files_and_settings(data: Any, changes: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.yaml"
        path.write_text(json.dumps(data), encoding="utf-8")
        with documented(RecipeError):
            recipe.build(str(path), {"ratio": 0.3, "sequences": 4}, [f"{key}={value}" for key, value in changes])
        with documented(RecipeError):
            recipe.build("svd", {}, [f"{key}={value}" for key, value in changes])


@few
@given(st.binary(max_size=60) | st.text(alphabet="[]{}:,&*!?|>-%@`\"'#~<= \nabc019_.", max_size=60).map(str.encode))
def test_recipe_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.yaml"
        path.write_bytes(content)
        with documented(RecipeError):
            recipe.build(str(path))


@pytest.mark.parametrize(
    "text",
    [
        *("2001-99-99", "!!int ''", "!!int x", "!!timestamp x", "!!bool x", "!!float x", "!!binary é", "!!set x"),
        *("&a [*a]", "[" * 3000, "{1: 2}", "? [a]\n: b", "9" * 5000, "\0", "a: *b"),
        "!!python/object/apply:os.system ['true']",
    ],
)
def test_odd_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"."):
        recipe.build(str(tmp_path / "odd.yaml"))
    with pytest.raises(RecipeError, match=r"."):
        recipe.build("svd", {}, [f"groups.0.ratio={text}"])


def test_yaml_that_grows_is_told_in_few_words(tmp_path: Path) -> None:
    """Nine references in each of nine lines: 9⁹ elements if written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "groups: *a9"]), encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        recipe.build(str(tmp_path / "bomb.yaml"))
    assert len(str(raised.value)) < 10_000


SPEC = ["format", "in", "out", "bias", "rank", "kept", "side", "nnz", "index", *modules.FORMATS, "rows", "csr", "mask"]
sizes = st.integers(-1, 40) | scalars
specs = st.fixed_dictionaries(
    {"format": st.sampled_from(sorted(modules.FORMATS)), "in": sizes, "out": sizes, "bias": st.booleans() | scalars},
    optional={
        "rank": sizes,
        "kept": sizes,
        "nnz": sizes,
        "side": st.sampled_from(SPEC),
        "index": st.sampled_from(SPEC),
    },
)


@few
@given(specs | nested(SPEC))
def test_specs(spec: Any) -> None:
    """One that passes can be made, and says itself again."""
    with documented():
        found = modules.checked(spec)
        assert modules.checked(found) == found
        module = modules.empty(found, device="meta")
        assert module.spec() == found
        assert sum(tensor.numel() for tensor in module.state_dict().values()) < 2**60


ENTRY = ["quant_method", "format_version", "layout", "spectrim", "model.layers.0.self_attn.q_proj", "", "..", *SPEC]
entries = st.fixed_dictionaries(
    {"quant_method": st.just("spectrim")},
    optional={
        "layout": st.dictionaries(st.sampled_from(ENTRY), specs, max_size=2) | nested(ENTRY),
        "format_version": st.just(1) | scalars,
        "more": scalars,
    },
)


@few
@given(entries | nested(ENTRY))
def test_layouts(entry: Any) -> None:
    with documented():
        quantizer.SpectrimConfig(layout=entry)
    with tempfile.TemporaryDirectory() as folder:
        config = json.dumps({"model_type": "llama", "quantization_config": entry})
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        with documented():
            found = loading.read_layout(folder)
            assert all(modules.checked(spec) == spec for spec in found.values())


INDEX = ["weight_map", "metadata", "model.safetensors", "../model.safetensors", "a.bin", "/etc/passwd", "."]
indices = st.fixed_dictionaries(
    {"weight_map": st.dictionaries(st.text(max_size=5), st.sampled_from(INDEX) | scalars, max_size=3) | nested(INDEX)}
)


@few
@given((indices | nested(INDEX)).map(json.dumps).map(str.encode) | st.binary(max_size=40))
def test_indices(llama_dir: Path, content: bytes) -> None:
    """What is found lies in the directory."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for name in ("config.json", "model.safetensors"):
            (directory / name).symlink_to(llama_dir / name)
        (directory / "model.safetensors.index.json").write_bytes(content)
        with documented():
            assert [file.parent for file in files.weight_files(directory)] == [directory]
            assert Checkpoint(directory).where


CONFIG = ["model_type", "llama", "gpt2", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
CONFIG += ["intermediate_size", "rope_parameters", "architectures", "auto_map", "dtype", "head_dim", "hidden_act"]
CONFIG += ["max_position_embeddings", "layer_types", "tie_word_embeddings", "quantization_config", "text_config"]


@few
@given(st.dictionaries(st.sampled_from(CONFIG), nested(CONFIG), max_size=4), st.booleans())
def test_configurations(llama_dir: Path, changes: dict[str, Any], alone: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "model.safetensors").symlink_to(llama_dir / "model.safetensors")
        config = json.loads((llama_dir / "config.json").read_text(encoding="utf-8"))
        data = changes if alone else {**config, **changes}
        (directory / "config.json").write_text(json.dumps(data), encoding="utf-8")
        with documented():
            Checkpoint(directory)


@few
@given(st.binary(max_size=80), st.integers(0, 200), st.booleans())
def test_safetensors_bytes(llama_dir: Path, content: bytes, place: int, alone: bool) -> None:
    """Bytes of the header overwritten, or a file of nothing else."""
    whole = (llama_dir / "model.safetensors").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").symlink_to(llama_dir / "config.json")
        damaged = content if alone else whole[:place] + content + whole[place + len(content) :]
        (directory / "model.safetensors").write_bytes(damaged)
        with documented():
            Checkpoint(directory)


PLAN = [
    "budget",
    "spent",
    "choices",
    "notes",
    "curves",
    "formats",
    "counts",
    "error",
    "bias",
    "keep",
    "rank",
    "low_rank",
]
choices = st.fixed_dictionaries(
    {"formats": st.dictionaries(st.sampled_from(PLAN), scalars, max_size=2), "counts": nested(PLAN)},
    optional={"error": scalars, "bias": scalars, "keep": nested(PLAN)},
)
plans = st.fixed_dictionaries(
    {"budget": st.integers(-1, 99), "spent": st.integers(-1, 99), "notes": st.lists(scalars, max_size=2)}
    | {"choices": st.dictionaries(st.text(max_size=3), choices, max_size=2) | nested(PLAN)},
    optional={"curves": nested(PLAN)},
)


@few
@given(plans | nested(PLAN))
def test_plans(data: Any) -> None:
    """One that is read writes itself again."""
    with documented():
        plan = Plan.from_json(data)
        assert Plan.from_json(json.loads(plan.dumps())).dumps() == plan.dumps()  # as text: NaN is not equal to itself
