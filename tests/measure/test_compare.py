"""Comparisons: what a cell measures, what is ranked, what goes on after a failure or a kill, and what is refused."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.testing import CliRunner

from spectrim import evaluate, load, pipeline
from spectrim.cli import app
from spectrim.measure import apart, plot, zero_shot
from spectrim.measure import compare as module
from spectrim.measure.compare import Comparison, Row, compare
from spectrim.model.files import resolve
from tests.conftest import tree_hash

SHARED = Path(__file__).resolve().parents[2] / "../shared"
SMALL: dict[str, Any] = {"sequences": 8, "length": 48, "window": 48, "limit": 2}
FFN = """about: FFN only
groups: [{match: [gate, up, down], ratio: 0.1, decompose: {method: svd}}]
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two texts to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tale.txt").write_text("Once there was a small river that ran to the sea. " * 20, encoding="utf-8")
    return ["reference-evaluation", str(folder / "tale.txt")]


@pytest.fixture(scope="module")
def arguments(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three recipes at a ratio that is possible and one that is not."""
    recipe = tmp_path_factory.mktemp("recipes") / "ffn.yaml"
    recipe.write_text(FFN, encoding="utf-8")
    recipes = ["svd", "whitened", str(recipe)]
    return {"model": "reference", "recipes": recipes, "ratios": [0.999, 0.2], "text": None, "heldout": texts, **SMALL}


@pytest.fixture(scope="module")
def made(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Comparison, Path]]:
    """The comparison of `arguments`, its checkpoints kept, and where it is; tests that write take a copy."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    # what lies in this process must not count as memory of a cell
    ballast = torch.ones(2**27)
    yield compare(**arguments, out=out, keep=True), out
    assert ballast.numel() == 2**27


@pytest.fixture
def copy(made: tuple[Comparison, Path], tmp_path: Path) -> Path:
    """A copy of that comparison without its checkpoints."""
    shutil.copytree(made[1], tmp_path / "out", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "out"


def numel(directory: Path) -> int:
    """Floating-point entries of the files, counted tensor by tensor."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def row(found: Comparison, recipe: str, ratio: float = 0.2) -> Row:
    (one,) = [r for r in found.rows if (Path(r.recipe).stem, r.ratio) == (recipe, ratio)]
    return one


def test_dense_first_then_by_ratio_in_the_order_asked(made: tuple[Comparison, Path]) -> None:
    found = [(Path(r.recipe).stem, r.format, r.ratio) for r in made[0].rows]
    cells = [(name, "plain", ratio) for ratio in (0.2, 0.999) for name in ("svd", "whitened", "ffn")]
    assert found == [("dense", None, 0.0), *cells]


def test_a_cell_holds_what_compress_and_evaluate_give(
    made: tuple[Comparison, Path], texts: list[str], tmp_path: Path
) -> None:
    found = row(made[0], "whitened")
    alone = pipeline.compress(
        "reference", "whitened", 0.2, "reference", tmp_path / "alone", sequences=8, length=48, work=tmp_path / "work"
    )
    assert alone.directory is not None
    directory, dense_directory = alone.directory, resolve("reference")
    tokenizer = AutoTokenizer.from_pretrained(dense_directory)
    model, dense = load(directory, dtype=torch.float32), load(dense_directory, dtype=torch.float32)
    for number, name in enumerate(texts):
        mine = evaluate(model, tokenizer, name, 48, 2, reference=dense if number == 0 else None)
        base = evaluate(dense, tokenizer, name, 48, 2)
        assert found.texts[name]["nll"] == pytest.approx(mine.nll, abs=1e-6)
        assert found.texts[name]["perplexity"] == pytest.approx(math.exp(mine.nll), rel=1e-5)
        assert found.texts[name]["excess"] == pytest.approx(mine.nll - base.nll, abs=2e-6)
        assert made[0].rows[0].texts[name]["nll"] == pytest.approx(base.nll, abs=1e-6)
        if number == 0:
            assert found.kl == pytest.approx(mine.kl, abs=1e-6)
    assert found.recipe_hash == alone.summary["recipe_hash"]
    kept, whole = numel(directory), numel(dense_directory)
    counts = alone.summary["parameters"]
    assert found.parameters["model_kept"] == kept and found.parameters["model_before"] == whole
    assert found.parameters["targets_kept"] == counts["targets_before"] - (whole - kept) == counts["targets_after"]
    assert tree_hash(Path(str(found.directory)), "run.json") == tree_hash(directory, "run.json")


def test_statistics_and_decompositions_are_shared(made: tuple[Comparison, Path]) -> None:
    found, out = made
    targets = len(list((out / "work" / "candidate").iterdir()))
    # the FFN's matrices were decomposed by the recipe svd already
    assert row(found, "svd").made == {"candidate": targets // 2}
    assert row(found, "whitened").made == {"candidate": targets // 2, "windows": 1}
    assert row(found, "ffn").made == {}
    assert all(row(found, name).seconds.keys() == {"compress", "evaluate"} for name in ("svd", "whitened", "ffn"))


def test_memory_is_the_cell_s_own(made: tuple[Comparison, Path]) -> None:
    # 512 MiB of ballast lie in this process, and the libraries alone take over 100 MB
    assert all(1e8 < (row(made[0], name).peak_memory_bytes or 0) < 6e8 for name in ("svd", "whitened"))


def test_only_what_keeps_the_same_is_ranked(made: tuple[Comparison, Path], texts: list[str]) -> None:
    svd, whitened, ffn = (row(made[0], name) for name in ("svd", "whitened", "ffn"))
    assert svd.comparable and whitened.comparable and not ffn.comparable and ffn.best == []
    for name in texts:
        losses = {one.recipe: one.texts[name]["nll"] for one in (svd, whitened)}
        assert [one.recipe for one in (svd, whitened) if name in one.best] == [min(losses, key=lambda r: losses[r])]
    # alone in its format and ratio nothing is best; half a percent of the targets is the limit
    rows = [made[0].rows[0], svd]
    assert module._ranked(rows, texts)[1].best == []
    for share, comparable in ((0.004, True), (0.006, False)):
        more = int(share * svd.parameters["targets_before"])
        other = replace(svd, parameters={**svd.parameters, "model_kept": svd.parameters["model_kept"] + more})
        assert module._ranked([*rows, other], texts)[2].comparable == comparable
    other = replace(whitened, format="pivot")
    assert [r.best for r in module._ranked([*rows, other], texts)] == [[], [], []]


def test_a_failed_cell_says_why_and_the_others_go_on(made: tuple[Comparison, Path]) -> None:
    found, out = made
    assert [(r.ratio, r.texts) for r in found.failed] == [(0.999, {})] * 3
    assert all("RecipeError" in str(r.error) and "largest possible ratio" in str(r.error) for r in found.failed)
    assert len(list((out / "cells").iterdir())) == 4 and len(list((out / "models").iterdir())) == 3


def test_what_is_written(made: tuple[Comparison, Path], texts: list[str]) -> None:
    found, out = made
    data = json.loads((out / "compare.json").read_text())
    assert data == json.loads(json.dumps(found.to_json()))
    assert set(data["protocol"]) == set(texts) and "first 2 of" in data["protocol"][texts[0]]
    assert data["calibration"] == {"text": ["reference"], "sequences": 8, "length": 48, "seed": 0}
    assert data["versions"].keys() >= {"spectrim", "torch"} and data["hardware"]["threads"] == 1
    lines = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 7 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert sum("★" in line for line in lines) >= 1 and sum("(not comparable)" in line for line in lines) == 1
    assert sum("failed: RecipeError" in line for line in lines) == 3
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (out / "compare.svg").read_text()


def test_the_figure_draws_the_rows(made: tuple[Comparison, Path], texts: list[str]) -> None:
    panels = plot.figure(made[0].to_json()).axes
    assert [panel.get_title() for panel in panels] == ["reference-evaluation, plain", "tale.txt, plain"]
    for panel, name in zip(panels, texts, strict=True):
        lines = {line.get_label(): line for line in panel.get_lines()}
        svd, ffn = row(made[0], "svd"), row(made[0], "ffn")
        assert list(lines["dense"].get_ydata()) == [made[0].rows[0].texts[name]["nll"]] * 2
        assert list(lines["svd"].get_ydata()) == [svd.texts[name]["nll"]]
        assert list(lines["svd"].get_xdata()) == pytest.approx([80], abs=0.1)
        assert list(lines[f"{ffn.recipe} (not comparable)"].get_ydata()) == [ffn.texts[name]["nll"]]


def test_a_killed_comparison_goes_on(
    made: tuple[Comparison, Path], copy: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = next(f for f in (copy / "cells").iterdir() if json.loads(f.read_text())["recipe"] == "whitened")
    lost.unlink()
    asked: list[str] = []
    real = apart.compress

    def counting(options: Any, progress: Any) -> Any:
        recipe = options["recipe"]
        asked.append(f"{recipe.groups[0].decompose[0].method} {recipe.groups[0].ratio}")
        if recipe.groups[0].ratio > 0.9:
            raise MemoryError("full")
        return real(options, progress)

    monkeypatch.setattr(apart, "compress", counting)
    again = compare(**arguments, out=copy)
    # failed cells are tried again, those that are done are not
    assert sorted(asked) == ["svd 0.999", "svd 0.999", "whitened_svd 0.2", "whitened_svd 0.999"]
    assert lost.exists() and not (copy / "models").exists()
    assert row(again, "whitened").made == {}
    assert [r.texts for r in again.rows] == [r.texts for r in made[0].rows]
    assert row(again, "svd").seconds == row(made[0], "svd").seconds
    assert {r.error for r in again.failed} == {"MemoryError: full"}


def test_an_interruption_stops_and_leaves_no_checkpoint(
    copy: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(options: Any, _: Any) -> Any:
        Path(options["out"]).mkdir(parents=True)
        (Path(options["out"]).parent / f".{Path(options['out']).name}.half").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(apart, "compress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(**arguments, out=copy)
    assert not (copy / "models").exists() and len(list((copy / "cells").iterdir())) == 4


def test_another_comparison_in_the_same_place(
    copy: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = tree_hash(copy)
    for change, named in (({"limit": 1}, "limit"), ({"ratios": [0.3]}, "cells"), ({"seed": 1}, "cells")):
        with pytest.raises(ValueError, match=f"holds another comparison.*{named}.*--overwrite"):
            compare(**{**arguments, **change}, out=copy)
    assert tree_hash(copy) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cells").write_text("mine")
    with pytest.raises(ValueError, match="no directory of a comparison"):
        compare(**arguments, out=tmp_path / "full", overwrite=True)

    def fail(*_: Any) -> Any:
        raise RuntimeError("not now")

    monkeypatch.setattr(apart, "compress", fail)
    replaced = compare(**{**arguments, "limit": 1}, out=copy, overwrite=True)
    assert {r.error for r in replaced.failed} == {"not now"} and len(replaced.failed) == 6
    assert len(list((copy / "cells").iterdir())) == 1 and not (copy / "compare.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ["svd", "whitend"]}, "did you mean 'whitened'"),
        ({"recipes": []}, "at least one of --recipes"),
        ({"recipes": ["svd", "svd"]}, "--recipes names 'svd' twice"),
        ({"ratios": [1.0]}, "groups.0.ratio"),
        ({"formats": ["sparse"]}, "groups.0.format"),
        ({"heldout": ["nowhere.txt"]}, "no such file: nowhere.txt"),
        ({"text": ["nowhere.txt"]}, "no such file: nowhere.txt"),
        ({"settings": ["groups.0.ratio=0.5"]}, "use --ratios and --formats"),
        ({"model": "./nowhere"}, "no such model directory"),
        ({"window": 1000}, "longer than the 512 positions"),
        ({"tasks": ["nowhere.jsonl"]}, "no such file of questions"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compressed(
    change: dict[str, Any], message: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "compress", lambda *_: pytest.fail("compressed"))
    with pytest.raises(ValueError, match=message):
        compare(**{**arguments, **change}, out=tmp_path / "out")


def test_recipes_that_read_other_text_are_no_comparison(arguments: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(FFN + "calibrate: {sequences: 9}\n", encoding="utf-8")
    asked = {**arguments, "recipes": ["svd", str(tmp_path / "more.yaml")], "sequences": None}
    with pytest.raises(ValueError, match=r"differ in calibrate\.sequences.*give --sequences"):
        compare(**asked, out=tmp_path / "out")


@pytest.mark.parametrize(("extra", "package"), [("report", "matplotlib"), ("eval", "lm_eval")])
def test_a_missing_extra_is_named(
    extra: str, package: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'spectrim\[{extra}\]'"):
        compare(**{**arguments, "tasks": ["arc_easy"] if extra == "eval" else []}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_is_one_failure(tmp_path: Path) -> None:
    def kill(*_: Any) -> None:
        (child,) = multiprocessing.active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)

    options = {"model": "reference", "recipe": "svd", "out": tmp_path / "out", "device": "cpu"}
    with pytest.raises(RuntimeError, match="was killed: most likely it ran out of memory"):
        apart.compress(options, kill)
    assert multiprocessing.active_children() == []


def test_the_command_prints_the_table_and_ends_with_1_if_a_cell_failed(copy: Path, arguments: dict[str, Any]) -> None:
    recipes, texts = arguments["recipes"], arguments["heldout"]
    asked = ["compare", "reference", "--out", str(copy), "--recipes", ",".join(recipes[:2]), "--recipes", recipes[2]]
    asked += ["--ratios", ".999,.2", "--heldout", texts[0], "--heldout", texts[1], "--no-plot"]
    asked += [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 1 and "3 of 6 cells failed" in shown.stderr
    assert "tale.txt: perplexity" in shown.stdout and "★" in shown.stdout and "largest possible ratio" in shown.stdout
    printed = CliRunner().invoke(app, [*asked, "--json"])
    assert printed.exit_code == 1
    assert json.loads(printed.stdout) == json.loads((copy / "compare.json").read_text())
    wrong = CliRunner().invoke(app, [*asked, "--ratios", "much"])
    assert wrong.exit_code == 2 and wrong.stdout == ""


QUESTIONS = [
    {"query": "Question: What flows to the sea?\n", "choices": ["a river, always and everywhere", "ink"], "gold": 0},
    {"query": "The cat sat on the", "choices": ["mat", "theory of numbers", "old wooden chair"], "gold": 2},
    {"query": "Once upon a", "choices": ["tide", "time there was a girl"], "gold": 1},
    {"query": "Question: Is ice cold?\nAnswer: ", "choices": ["no", "yes, it is"], "gold": 0},
]
TWINS = [
    {"context_options": ["The girl went home because the girl", "Stones"], "continuation": "was tired.", "gold": 0},
    {"context_options": ["Seven", "He opened the door and he"], "continuation": "saw the room.", "gold": 0},
]


def scored(model: Any, tokenizer: Any, before: str, after: str) -> float:
    """log p(after | before), a token at a time."""
    start, ids = len(tokenizer(before)["input_ids"]), tokenizer(f"{before} {after}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_accuracies_are_those_of_a_count_by_hand(tmp_path: Path) -> None:
    for name, rows in (("questions", QUESTIONS), ("twins", TWINS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    directory = resolve("reference")
    model, tokenizer = load(directory, dtype=torch.float32), AutoTokenizer.from_pretrained(directory)
    tasks = [str(tmp_path / f"{name}.jsonl") for name in ("questions", "twins")]
    zero_shot.check(tasks)
    found = zero_shot.accuracies(model, tokenizer, tasks)

    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "twins": []}
    prompts = ["Question: What flows to the sea?\nAnswer:", "The cat sat on the", "Once upon a"]
    for prompt, question in zip([*prompts, "Question: Is ice cold?\nAnswer:"], QUESTIONS, strict=True):
        choices: Any = question["choices"]
        scores = torch.tensor([scored(model, tokenizer, prompt, choice) for choice in choices])
        lengths = torch.tensor([len(choice) for choice in choices])
        right["acc"].append(int(scores.argmax()) == question["gold"])
        right["acc_norm"].append(int((scores / lengths).argmax()) == question["gold"])
    for twin in TWINS:
        contexts: Any = twin["context_options"]
        both = torch.tensor([scored(model, tokenizer, context, str(twin["continuation"])) for context in contexts])
        right["twins"].append(int(both.argmax()) == twin["gold"])

    for metric in ("acc", "acc_norm"):
        hits = torch.tensor(right[metric], dtype=torch.float64)
        assert found["questions"][metric] == pytest.approx(float(hits.mean()))
        assert found["questions"][f"{metric}_stderr"] == pytest.approx(float(hits.std() / len(hits) ** 0.5))
    assert right["acc"] != right["acc_norm"]  # else the two could be mixed up
    assert found["twins"]["acc"] == sum(right["twins"]) / 2 and "acc_norm" not in found["twins"]


@pytest.mark.slow  # lm-eval reads the descriptions of all its tasks
def test_an_unknown_task_is_refused() -> None:
    zero_shot.check(["arc_easy"])
    with pytest.raises(ValueError, match=r"no task of lm-eval and no \.jsonl file: arc_eazy"):
        zero_shot.check(["arc_easy", "arc_eazy"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"),
        ([QUESTIONS[0], TWINS[0]], "line 2: another form"),
        ([{"context": "a", "continuation": "b"}], "line 1: neither query"),
        ([{**QUESTIONS[0], "gold": 2}], "gold the index of one"),
        ([{**QUESTIONS[0], "gold": True}], "gold the index of one"),
        ([{**QUESTIONS[0], "choices": ["one"]}], "2 texts or more"),
    ],
)
def test_a_file_that_is_no_questions_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        zero_shot.check([str(path)])


def test_known_files_of_questions_are_read() -> None:
    folder = SHARED / "data" / "zero_shot"
    if not folder.is_dir():
        pytest.skip("the files of questions are not here")
    files = sorted(path for path in folder.glob("*.jsonl") if "lambada" not in path.name)
    assert len(files) == 10
    zero_shot.check([str(path) for path in files])
