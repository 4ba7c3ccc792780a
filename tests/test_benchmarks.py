"""The benchmarks run at toy size and give well-formed results; whether bounds hold is not asked here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import common, decompose, inference, memory, rpca, run, sparse, whole_run
from benchmarks.common import Bound, Case
from spectrim.model import modules

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def well_formed(case: Case, bound: Bound | None) -> dict[str, Any]:
    """The case as read back from JSON, its common fields checked."""
    data: dict[str, Any] = json.loads(json.dumps(case.to_json()))
    assert 0 < data["min"] <= data["value"] <= data["max"] < math.inf
    assert data["repeats"] == len(case.values) * case.each
    assert data["threads"] == 1
    assert case.bound == bound
    assert data["holds"] is (None if bound is None else bound.holds(data["value"]))
    return data


@pytest.mark.parametrize(
    ("side", "value", "holds"),
    [("at most", 1.0, True), ("at most", 1.1, False), ("at least", 1.0, True), ("at least", 0.9, False)],
)
def test_bound_sides(side: Any, value: float, holds: bool) -> None:
    assert Bound(side, 1.0).holds(value) is holds


def test_case_takes_the_median_and_counts_repeats() -> None:
    data = Case("x", (3.0, 1.0, 2.0), 1, bound=Bound("at most", 1.5), each=5).to_json()
    assert (data["value"], data["min"], data["max"], data["repeats"], data["holds"]) == (2.0, 1.0, 3.0, 15, False)


def test_runs_take_turns() -> None:
    order: list[str] = []
    turns = common.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 2
    assert all(len(turns.wall[name]) == len(turns.processor[name]) == 2 for name in "ab")
    with pytest.raises(ValueError, match="repeats is 0"):
        common.in_turns({}, 0)


def test_ratios_are_taken_turn_by_turn() -> None:
    assert common.ratios({"a": [6.0, 8.0], "b": [1.0, 2.0], "c": [2.0, 2.0]}, "a", ["b", "c"]) == (2.0, 2.0)


def test_result_says_where_it_was_taken() -> None:
    made = common.result("x", [Case("y", (1.0,), 1)], {"z": 1})
    assert set(made) == {"benchmark", "commit", "dirty", "versions", "hardware", "settings", "cases"}
    assert made["hardware"]["cores"] >= 1 and made["hardware"]["cpu"]
    assert made["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(made["versions"]["torch"])


@pytest.mark.parametrize(("out_features", "in_features"), [(12, 12), (12, 20), (20, 12)])
def test_decompose(out_features: int, in_features: int) -> None:
    made = decompose.cases(out_features, in_features, 2, 1)
    bounds = [decompose.OVER_KERNELS, decompose.OVER_CHOLESKY][: len(made)]
    assert len(made) == (2 if out_features <= in_features else 1)
    for case, bound in zip(made, bounds, strict=True):
        data = well_formed(case, bound)
        assert data["details"]["rank"] == (out_features * in_features - 1) // (out_features + in_features)


def test_the_routes_compared_agree() -> None:
    """Both span the same directions, so that they can be compared; the kernels have the shape of what ours returns."""
    weight, gram = decompose.problem(10, 16)
    assert torch.linalg.cholesky_ex(gram).info == 0
    left, usual = decompose.directions(weight, gram)[0], decompose.cholesky(weight, gram)
    torch.testing.assert_close((left.T @ usual).abs().diagonal(), torch.ones(10, dtype=torch.float64))
    right = decompose.ours(weight, gram, 4)
    torch.testing.assert_close(right, left[:, :4].float().T @ weight)
    assert decompose.kernels(weight, gram, left[:, :4].float()).shape == right.shape


def test_whole_run(tmp_path: Path) -> None:
    setting = whole_run.prepare(tmp_path, TINY, sequences=4, length=16, batch=2, timed_blocks=1)
    (case,) = whole_run.cases(setting, 2, 1)
    data = well_formed(case, whole_run.OVER_PARTS)
    assert set(data["details"]["shares"]) == set(whole_run.PARTS)
    assert setting.last is not None and setting.last.summary["ratio_actual"] >= whole_run.RATIO
    # every run began from nothing: what the first one stored was not there for the others
    assert setting.runs == 2 and len(list(tmp_path.glob("compressed-*.work"))) == 2
    assert setting.last.run["timings"]["decompose"] > 0


def test_inference() -> None:
    made = inference.cases(TINY, 6, 3, 2, 5, ("plain", "pivot"))
    assert [case.name for case in made] == ["plain prefill", "plain decode", "pivot prefill", "pivot decode"]
    for case in made:
        data = well_formed(case, inference.SHARE)
        assert data["repeats"] == 10 and data["details"]["dense_over_compressed_parameters"] > 1


def test_sparse() -> None:
    made = sparse.cases((48, 32), torch.float32, 0.1, (1, 20), 2, 2)
    assert made and all(well_formed(case, sparse.bound(torch.float32, 0.1, 20)) for case in made)


def test_rpca() -> None:
    data = well_formed(rpca.case(24, "inexact", 2), rpca.OVER_KERNELS)
    assert data["details"]["iterations"] > 1


@pytest.mark.parametrize("format", ["plain", "pivot"])
def test_the_compressed_model_has_the_parameters_of_the_ratio(format: str) -> None:
    dense = inference.dense_model(TINY)
    model = inference.compressed_model(dense, 0.4, format)
    removed = inference.parameters(dense) - inference.parameters(model)
    targets = 2 * sum(m * n for m, n in memory.matrices(TINY).values())
    assert 0.4 * targets <= removed <= 0.43 * targets
    assert sum(modules.spec_of(module) is not None for module in model.modules()) == 14
    assert torch.isfinite(model(input_ids=torch.arange(5)[None]).logits).all()


def test_the_generated_checkpoint_is_a_whole_model(tmp_path: Path) -> None:
    parameters = memory.generate(tmp_path, TINY)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert inference.parameters(model) == parameters and model.dtype == torch.bfloat16
    stored = load_file(tmp_path / "model-00001.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(model.get_parameter("model.layers.1.mlp.down_proj.weight").data, stored)


def test_memory_terms_are_bytes() -> None:
    found = memory.terms(TINY, (2, 8), 4)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    assert found["embedding"] == 4 * 128 * 32 and found["three_blocks"] == 3 * 4 * block
    assert found["statistics"] == 8 * (3 * 32**2 + 48**2)
    assert found["factorisation"] == 8 * (3 * 32 * 48 + 5 * 32**2)
    assert found["activations"] == 4 * 16 * (32 + 4 * 80)
    assert memory.terms(TINY, (2, 8), 2)["three_blocks"] == found["three_blocks"] // 2


def test_memory_runs_in_a_process_of_its_own() -> None:
    case = memory.case({**TINY, "num_hidden_layers": 3}, (2, 16), every=False, threads=1)
    details = well_formed(case, memory.WITHIN)["details"]
    assert details["decomposed_blocks"] == 2
    assert details["peak"] - details["imports"] == details["peak_over_imports"] > 0
    assert sum(details["bound_terms"].values()) == details["bound"]


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    case = Case("one", (1.25, 1.0, 1.5), 2, bound=Bound("at most", 1.2))
    common.write(tmp_path / "decompose.json", common.result("decompose", [case], {}))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.START}\nthe old table\n{run.END}\nafter\n", encoding="utf-8")
    for _ in range(2):  # a second time changes nothing
        run.write_tables(tmp_path, [page])
    text = page.read_text(encoding="utf-8")
    assert "| decompose | one | 1.250 | 1.000 to 1.500 | at most 1.2 | **no** | 2 | 3 |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "the old table" not in text
    assert text.count("| one |") == 1
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="between which the table belongs"):
        run.write_tables(tmp_path, [page])


@pytest.mark.parametrize("name", run.NAMES)
def test_kept_results_are_well_formed_and_in_the_pages(name: str) -> None:
    file = run.RESULTS / f"{name}.json"
    if not file.exists():
        pytest.skip(f"no result of {name} is kept")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["benchmark"] == name and result["cases"]
    for page in run.PAGES:
        assert run.table([result]).splitlines()[2] in page.read_text(encoding="utf-8")
