"""`tune:` of a recipe: what it keeps, on which text, at which rate, whether it is taken, and that it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import spectrim
from spectrim import recipe as recipes
from spectrim import recovery
from spectrim.cli import app
from spectrim.data import text as texts
from spectrim.finetune.full import RELATIVE
from spectrim.learn.tuning import Diverged
from spectrim.measure.compare import compare
from spectrim.model import loading
from spectrim.model.files import read_tokenizer
from spectrim.pipeline import Result
from spectrim.recipe import RecipeError
from tests.conftest import letters, tree_hash
from tests.families import FAMILIES
from tests.processes import compressed_together

LENGTH, BATCH = 24, 8
STEP = LENGTH * BATCH


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of 12000 letters: 500 windows."""
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text(letters(12000, seed=3), encoding="utf-8")
    return path


def recipe_of(folder: Path, method: str = "whitened_svd", format: str = "plain", **tune: Any) -> str:
    """A recipe with a tuning of 60 steps, and enough windows to choose and to accept on."""
    path = folder / f"{method}-{len(list(folder.glob('*.yaml')))}.yaml"
    data: dict[str, Any] = {
        "calibrate": {"sequences": 120, "length": LENGTH, "select": 0.4, "accept": 0.4},
        "groups": [{"ratio": 0.3, "format": format, "decompose": {"method": method}}],
        "tune": {"tokens": 60 * STEP, "batch_size": BATCH, **tune},
    }
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_it_is_nearer_to_the_dense_model_at_the_same_size(llama_dir: Path, story: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", recipe_of(tmp_path)
    made = spectrim.compress(llama_dir, asked, text=str(story), out=out, tokens=50 * STEP)
    once = spectrim.compress(llama_dir, _untuned(asked), text=str(story), out=tmp_path / "once")
    assert loading.read_layout(out) == loading.read_layout(tmp_path / "once")
    assert made.summary["parameters"] == once.summary["parameters"]
    assert made.summary == json.loads((out / "spectrim.json").read_text())
    found, (record,) = made.summary["recovery"], made.summary["finetuning"]
    assert found["accepted"] and found["accept"]["after"]["kl"] < 0.7 * found["accept"]["before"]["kl"]
    assert found["tokens"] == 50 * STEP == made.summary["recipe"]["tune"]["tokens"]
    assert len(found["tries"]) >= 3 and found["learning_rate"] == record["learning_rate"]
    assert f"{found['learning_rate']:.4g}" == min(found["tries"], key=lambda rate: found["tries"][rate])
    assert record["steps"] == 50 - 5 * len(found["tries"]) and record["method"]["relative"] is True
    assert record["distill"]["weight"] == 1 and record["parameters_before"] == record["parameters_after"]
    notes = made.plan.notes[-2:]
    assert all(f"{rate}: {loss:.4g}" in notes[0] for rate, loss in found["tries"].items())
    assert f"{50 * STEP:,} tokens" in notes[1] and f"{found['accept']['before']['kl']:.4g} before" in notes[1]
    assert list(notes) == made.summary["plan"]["notes"][-2:] and "tune" in made.run["timings"]
    assert not (tmp_path / "out.work" / "recovery").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert spectrim.evaluate(model, read_tokenizer(out, False), str(story), LENGTH).nll > 0
    before = tree_hash(out)
    again = spectrim.compress(llama_dir, asked, text=str(story), out=out, tokens=50 * STEP)
    assert again.summary == made.summary and tree_hash(out) == before, "the same command is answered"
    with pytest.raises(ValueError, match="is not empty"):
        spectrim.compress(llama_dir, asked, text=str(story), out=out, tokens=40 * STEP)


def _untuned(asked: str) -> str:
    data = {key: value for key, value in yaml.safe_load(Path(asked).read_text()).items() if key != "tune"}
    path = Path(asked).with_name(f"without-{Path(asked).name}")
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_it_is_tuned_on_no_token_that_it_is_judged_by(
    llama_dir: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    trained = recovery.Tuning.trained

    def watched(self: Any, work: Path) -> Any:
        seen.append(torch.stack([row.ids for row in self.rows]))
        return trained(self, work)

    monkeypatch.setattr(recovery.Tuning, "trained", watched)
    spectrim.compress(
        llama_dir, recipe_of(tmp_path, learning_rate=0.01, window=12), text=str(story), out=tmp_path / "out"
    )
    (rows,) = seen
    tokenizer = read_tokenizer(llama_dir, False)
    windows = texts.sample_windows([texts.Source(str(story))], tokenizer, 120, LENGTH, 0)
    judged = {tuple(half.tolist()) for window in windows[24:] for half in window.view(2, 12)}
    fitted = {tuple(half.tolist()) for window in windows[:24] for half in window.view(2, 12)}
    # random letters: no two windows of twelve are alike by chance, and these begin where a fixed window does
    found = {tuple(row.tolist()) for row in rows}
    assert not found & judged and found & fitted
    assert len(found) == len(rows), "each of them once"


@pytest.mark.parametrize("rate", [300.0, None])
def test_what_is_no_better_is_not_taken(
    rate: float | None, llama_dir: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: Any, work: Path) -> Any:
        raise Diverged("the loss is nan at step 3")

    if rate is None:
        monkeypatch.setattr(recovery.Tuning, "trained", diverging)
    asked = recipe_of(tmp_path, learning_rate=rate or 0.01)
    made = spectrim.compress(llama_dir, asked, text=str(story), out=tmp_path / "out")
    spectrim.compress(llama_dir, _untuned(asked), text=str(story), out=tmp_path / "once")
    assert "the untuned model stays" in made.plan.notes[-1] and not made.summary["recovery"]["accepted"]
    assert "finetuning" not in made.summary
    described = ("spectrim.json", "run.json")
    assert tree_hash(tmp_path / "out", *described) == tree_hash(tmp_path / "once", *described)
    again = spectrim.compress(llama_dir, asked, text=str(story), out=tmp_path / "out")
    assert again.summary == made.summary


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_tune_as_one(llama_dir: Path, story: Path, tmp_path: Path) -> None:
    """Every rate is tried on the same batches, halved between them; both judge, one writes."""
    save_file({"ids": torch.zeros(1, LENGTH, dtype=torch.int64)}, tmp_path / "windows.safetensors")
    run = {"model": llama_dir, "recipe": recipe_of(tmp_path), "text": str(story), "tokens": 40 * STEP}
    compressed_together(tmp_path, [{**run, "out": tmp_path / "two"}])
    made = spectrim.compress(**run, out=tmp_path / "one")
    one = made.summary["recovery"]
    two = json.loads((tmp_path / "two" / "spectrim.json").read_text(encoding="utf-8"))["recovery"]
    assert one["learning_rate"] == two["learning_rate"] and one["tokens"] == two["tokens"] and two["accepted"]
    assert one["tries"].keys() == two["tries"].keys()
    for rate, loss in one["tries"].items():
        assert two["tries"][rate] == pytest.approx(loss, rel=1e-3)
    assert two["accept"]["after"]["kl"] == pytest.approx(one["accept"]["after"]["kl"], rel=1e-3)
    assert loading.read_layout(tmp_path / "one") == loading.read_layout(tmp_path / "two")
    assert not (tmp_path / "two.work" / "recovery").exists()


def test_too_little_text_to_choose_or_accept_on(
    llama_dir: Path, story: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = ["calibrate.sequences=20", "tune.tokens=2e4"]
    made = spectrim.compress(llama_dir, recipe_of(tmp_path), text=str(story), out=tmp_path / "out", settings=few)
    assert f"auto has {8 * LENGTH} tokens of calibrate.select to choose on, not 1024: it is {RELATIVE}" in caplog.text
    assert "not checked: 192 tokens of calibrate.accept" in caplog.text
    assert "it goes round again" in caplog.text, "2e4 tokens of a text of 1.2e4"
    found = made.summary["recovery"]
    assert found["learning_rate"] == RELATIVE and found["accepted"] and found["tries"] == {}
    assert found["tokens"] == int(2e4) // STEP * STEP


def test_windows_instead_of_a_text(llama_dir: Path, tmp_path: Path) -> None:
    windows = torch.randint(1, 64, (120, LENGTH), generator=torch.Generator().manual_seed(0))
    made = spectrim.compress(
        llama_dir, recipe_of(tmp_path, learning_rate=0.01, tokens=9 * STEP), text=windows, out=tmp_path / "out"
    )
    assert made.summary["finetuning"][0]["rows"] == 24, "those of statistics"


def test_where_nothing_was_decomposed_nothing_is_tuned(llama_dir: Path, tmp_path: Path) -> None:
    windows = torch.randint(1, 64, (120, LENGTH), generator=torch.Generator().manual_seed(0))
    made = spectrim.compress(llama_dir, recipe_of(tmp_path), 0.0, windows, tmp_path / "out")
    assert made.plan.notes[-1] == "tune: every matrix stays dense, so there is nothing to tune"
    assert "finetuning" not in made.summary and made.summary["recovery"]["tokens"] == 0


class Stopped(Exception):
    """The run ends here."""


@pytest.fixture(scope="module")
def whole(llama_dir: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return spectrim.compress(llama_dir, recipe_of(folder, tokens=40 * STEP), text=str(story), out=folder / "out")


@pytest.mark.parametrize(
    "at", [pytest.param(11, marks=pytest.mark.slow), 30, pytest.param(None, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    at: int | None, whole: Result, llama_dir: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third try, in the training, and when only the output is left to be written."""
    asked, calls = recipe_of(tmp_path, tokens=40 * STEP), 0

    def stopping(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += stage == "tune"
        if calls == at:
            raise Stopped

    def run() -> Result:
        return spectrim.compress(llama_dir, asked, text=str(story), out=tmp_path / "out", progress=stopping)

    def refused(*args: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        if at is None:
            patch.setattr(recovery.Recovery, "_deliver", refused)
        with pytest.raises(Stopped):
            run()
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.work" / "recovery").glob("*/untuned"))
    # a try that was done is not trained again, nor is the training; the one under way is, having no checkpoint yet
    done = 40 if at is None else min((calls - 1) // 4, len(whole.summary["recovery"]["tries"])) * 4
    calls, at = 0, -1
    made = run()
    assert made.summary == whole.summary
    assert whole.directory is not None
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(whole.directory, "run.json")
    assert calls == 40 - done


def test_rates_are_tried_outwards_while_the_best_is_at_an_end() -> None:
    def tried(best: float, finite: float = math.inf) -> list[float]:
        found = recovery.searched(lambda rate: abs(math.log(rate / best)) if rate < finite else math.inf, 1.0)
        return sorted(found)

    third = 1 / 3
    assert tried(1.1) == pytest.approx([third, 1, 3])
    assert tried(3.2) == pytest.approx([third, 1, 3, 9])
    assert tried(100) == pytest.approx([third, 1, 3, 9, 27])
    assert tried(0.01) == pytest.approx([third**3, third**2, third, 1, 3])
    assert tried(100, finite=2) == pytest.approx([third, 1, 3])
    assert len(tried(1, finite=0)) == 3


def test_the_shipped_recipe_and_the_command_line(llama_dir: Path, story: Path, tmp_path: Path) -> None:
    options = ["--sequences", "100", "--length", "24", "--set", "calibrate.mix=0.5", "--set", "tune.learning_rate=0.01"]
    options += ["--set", "groups.0.allocate.trial=2", "--set", "groups.0.allocate.rounds=0", "--tokens", "2e4"]
    command = ["compress", str(llama_dir), "--recipe", "spectrim-tuned", "--ratio", "0.3", "--text", str(story)]
    done = CliRunner().invoke(app, [*command, *options, "--json", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["recipe"]["tune"]["tokens"] == 20000 and summary["recipe"]["calibrate"]["target"] == "mix"
    assert summary["recovery"]["accepted"] and 0.29 < summary["ratio_actual"] <= 0.31
    base = recipes.build("spectrim").model_dump(exclude={"about", "tune"})
    assert recipes.build("spectrim-tuned").model_dump(exclude={"about", "tune"}) == base
    planned = CliRunner().invoke(app, ["plan", str(llama_dir), "--recipe", "spectrim-tuned", "--length", "24"])
    assert planned.exit_code == 0, planned.output


def test_it_is_compared_like_any_other(llama_dir: Path, story: Path, tmp_path: Path) -> None:
    asked = recipe_of(tmp_path, learning_rate=0.01)
    without = _untuned(asked)
    found = compare(
        str(llama_dir), [asked, without], [0.3], str(story), str(story), tmp_path / "out", limit=40, window=LENGTH,
        figure=False,
    )  # fmt: skip
    assert not found.failed, found.failed
    tuned, plain = (next(row for row in found.rows if row.recipe == name) for name in (asked, without))
    assert tuned.comparable and plain.comparable and tuned.parameters == plain.parameters
    assert tuned.kl is not None and plain.kl is not None and tuned.kl < plain.kl


def test_what_cannot_be_is_said(llama_dir: Path, story: Path, tmp_path: Path) -> None:
    asked = recipe_of(tmp_path)
    given: dict[str, Any] = {"text": str(story), "out": tmp_path / "out"}
    for settings, message in {
        "tune.tokens=100": "tune.tokens is 100, less than one step of 8 windows of 24 tokens",
        "tune.tokens=0": "tune.tokens",
        "tune.tokens=many": "tune.tokens: .* given 'many'",
        "tune.window=4096": "tune.window is 4096, and the model has 48 positions",
        "tune.method=retruncating": "does not tune the factors as they are",
        "tune.method=mixed_rank": "does not tune the factors as they are",
        "tune.method=ful": "did you mean 'full'",
        "tune.settings={norm: true}": "did you mean 'norms'",
        "tune.learning_rate=-1": "tune.learning_rate",
        "tune.rate=1": "unknown key tune.rate",
        "tune.batch_size=0": "tune.batch_size",
    }.items():
        with pytest.raises(RecipeError, match=message):
            spectrim.compress(llama_dir, asked, settings=[settings], **given)
    with pytest.raises(RecipeError, match=r"tokens are given, but the recipe svd has no .*: spectrim-tuned"):
        spectrim.compress(llama_dir, "svd", tokens=1000, **given)
    with pytest.raises(ValueError, match="the loss of its tuning on calibration text: give --text"):
        spectrim.compress(llama_dir, recipe_of(tmp_path, "svd"), out=tmp_path / "out")
    windows = torch.randint(1, 64, (120, LENGTH), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="a live model is compressed in place"):
        spectrim.compress(FAMILIES["llama"].make(), asked, text=windows)
    assert not (tmp_path / "out").exists()
