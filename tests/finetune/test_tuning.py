"""tune(): what it keeps, what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import spectrim
from spectrim import tuning
from spectrim.cli import app
from spectrim.core.finetuner import finetuners
from spectrim.model import loading
from spectrim.recipe import RecipeError
from tests.conftest import tree_hash

TOKENS = torch.arange(1, 21).view(2, 10)
FEW: dict[str, Any] = {"steps": 4, "batch_size": 4, "window": 16, "learning_rate": 1e-2}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("method", ["rank_preserving", "full", "vectors", "retruncating"])
def test_a_tuned_model_is_a_compressed_one_of_the_same_size(
    method: str, every_format_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = spectrim.tune(every_format_dir, str(rows_file), out, method, **FEW)
    assert loading.read_layout(out) == loading.read_layout(every_format_dir)
    assert made.record["parameters_before"] == made.record["parameters_after"] > 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(model) - logits(loading.load(every_format_dir))).abs().max() > 1e-4
    assert spectrim.evaluate  # the tuned directory is measured like any other
    summary = json.loads((out / "spectrim.json").read_text())
    assert summary["finetuning"][-1]["method"]["method"] == method
    assert [entry["step"] for entry in made.record["history"]][-1] == 4
    assert not (tmp_path / "out.work" / "tune").exists()


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_merging_changes_nothing(mode: str, every_format_dir: Path) -> None:
    """With random adapters, merged and unmerged answers agree, and step 0 is the compressed model."""
    model = loading.load(every_format_dir, dtype=torch.float32).requires_grad_(False)
    before, layout = logits(model), loading.read_layout(every_format_dir)
    scale = before.abs().max()
    way = finetuners()["rank_preserving"](rank=2, mode=mode)
    for stage in range(way.stages):
        session = way.begin(model, stage, torch.Generator().manual_seed(0))
        torch.testing.assert_close(logits(session.model) / scale, before / scale, rtol=0, atol=1e-6)
        with torch.no_grad():
            for name, parameter in session.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
        unmerged = logits(session.model)
        assert (unmerged - before).abs().max() > 1e-3
        model = session.finish()
        torch.testing.assert_close(logits(model) / scale, unmerged / scale, rtol=0, atol=1e-5)
        before = unmerged
    loading.attach(model, layout)
    assert not [name for name, _ in model.named_modules() if "lora" in name]


def test_kept_columns_of_a_pivot_stay_exact(every_format_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    layout = loading.read_layout(every_format_dir)
    both = [name for name, spec in layout.items() if spec["format"] == "pivot" and spec.get("kept")]
    assert both
    spectrim.tune(every_format_dir, str(rows_file), tmp_path / "out", **FEW, settings=["train.weight_decay=0.1"])
    before, after = (loading.load(path).state_dict() for path in (every_format_dir, tmp_path / "out"))
    for name in both:
        kept = layout[name]["kept"]
        assert torch.equal(before[f"{name}.base.weight"][:, :kept], after[f"{name}.base.weight"][:, :kept])
        assert not torch.equal(before[f"{name}.base.weight"], after[f"{name}.base.weight"])
    for name, spec in layout.items():
        for tensor in {"low_rank_columns": ["kept.weight", "columns"], "low_rank_sparse": ["values"]}.get(
            spec["format"], []
        ):
            assert torch.equal(before[f"{name}.{tensor}"], after[f"{name}.{tensor}"])


@pytest.mark.parametrize("settings", [[], ["method.mode=sequential"], ["method.dropout=0.3"]])
@pytest.mark.parametrize("stopped_at", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    stopped_at: int, settings: list[str], small_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stopped_at:
            raise Stopped

    options = {**FEW, "steps": 6, "settings": [*settings, "train.save_steps=2", "train.logging_steps=2"]}
    spectrim.tune(small_dir, str(rows_file), tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        spectrim.tune(small_dir, str(rows_file), tmp_path / "out", **options, progress=stop)
    assert not (tmp_path / "out").exists()
    made = spectrim.tune(small_dir, str(rows_file), tmp_path / "out", **options)
    assert tree_hash(tmp_path / "whole", "run.json") == tree_hash(tmp_path / "out", "run.json")
    assert made.record["steps"] == 6


def test_a_checkpoint_cut_short_is_not_used(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-2" / "complete").touch()
    from spectrim.learn.tuning import latest

    assert latest(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-10").exists()


def test_accumulated_rows_make_the_same_steps(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    for name, micro in (("one", 4), ("two", 2), ("four", 1)):
        options = {**FEW, "settings": [f"train.micro_batch_size={micro}"]}
        spectrim.tune(small_dir, str(rows_file), tmp_path / name, **options)
    wanted = loading.load(tmp_path / "one").state_dict()
    for name in ("two", "four"):
        for key, tensor in loading.load(tmp_path / name).state_dict().items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


def test_a_teacher_that_is_the_model_itself_teaches_nothing(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    made = spectrim.tune(
        small_dir,
        str(rows_file),
        tmp_path / "out",
        teacher=small_dir,
        **FEW,
        settings=["distill.hidden=1.0", "train.logging_steps=1"],
    )
    assert abs(made.record["history"][0]["loss"]) < 1e-6


def test_a_dense_teacher_brings_the_model_nearer(
    small_dir: Path, llama_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    made = spectrim.tune(
        small_dir, str(rows_file), tmp_path / "out", teacher=llama_dir, **{**FEW, "steps": 30},
        settings=["train.logging_steps=1"],
    )  # fmt: skip
    losses = [entry["loss"] for entry in made.record["history"]]
    assert 0 < losses[-1] < 0.8 * losses[0]
    teacher, before, after = (loading.load(path) for path in (llama_dir, small_dir, tmp_path / "out"))
    gaps = [(logits(model).log_softmax(-1) - logits(teacher).log_softmax(-1)).abs().mean() for model in (before, after)]
    assert gaps[1] < gaps[0]


def test_answers_of_chats_are_learned(small_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c * 4}]}) + "\n"
            for c in "abcd"
        )
    )
    options = {**FEW, "window": 48, "steps": 40, "settings": ["train.logging_steps=1"]}
    made = spectrim.tune(small_dir, str(path), tmp_path / "out", **options)
    losses = [entry["loss"] for entry in made.record["history"]]
    assert losses[-1] < 0.7 * losses[0]
    assert made.record["rows"] == 4


def test_initialisations(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    first = {}
    for method in ("none", "balanced", "refined"):
        made = spectrim.tune(
            small_dir, str(rows_file), tmp_path / method, "full", **FEW,
            settings=[f"start.method={method}", "train.logging_steps=1"],
        )  # fmt: skip
        first[method] = made.record["history"][0]["loss"]
    assert first["balanced"] == pytest.approx(first["none"], rel=1e-4)
    assert first["refined"] != pytest.approx(first["none"], rel=1e-4)


def test_bfloat16_checkpoints_are_tuned_in_float32(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    half = loading.load(small_dir, dtype=torch.bfloat16)
    loading.save(half, tmp_path / "half")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / file).write_bytes((small_dir / file).read_bytes())
    spectrim.tune(tmp_path / "half", str(rows_file), tmp_path / "out", **FEW)
    made = loading.load(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(p, q) for p, q in zip(made.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 3, "epochs": 1.0}, "give one of them"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"batch_size": 3, "settings": ["train.micro_batch_size=2"]}, "does not share out"),
        ({"method": "rank_preservin"}, "did you mean 'rank_preserving'"),
        ({"settings": ["method.rnk=3"]}, "did you mean 'rank'"),
        ({"settings": ["train.steps"]}, "part.key=value"),
        ({"settings": ["trian.steps=1"]}, "part.key=value"),
        ({"window": 100000}, "exceeds the model's maximum"),
        ({"dense": "small"}, "uses no second model"),
        ({"settings": ["distill.weight=0.5"]}, "--teacher"),
        ({"settings": ["train.precision=float16"]}, "GPU"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], message: str, small_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    if options.get("dense") == "small":
        options = {**options, "dense": small_dir}
    with pytest.raises(ValueError, match=message):
        spectrim.tune(small_dir, str(rows_file), tmp_path / "out", **{"steps": None, "window": 16, **options})
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_sent_to_compress(llama_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spectrim compress"):
        spectrim.tune(llama_dir, str(rows_file), tmp_path / "out", window=16)


def test_a_loss_that_is_not_finite_ends_the_run(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {**FEW, "learning_rate": 1e30, "steps": 6}
    with pytest.raises(ValueError, match=r"loss is .* at step \d"):
        spectrim.tune(small_dir, str(rows_file), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_request_is_checked_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match="batch_size"):
        tuning.requested("full", {"train.batch_size": 0})


def test_the_command_line(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    arguments = ["finetune", str(small_dir), "--data", str(rows_file), "--out", str(tmp_path / "out"), "--steps", "2"]
    arguments += ["--batch-size", "2", "--window", "16", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["steps"] == 2
    again = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert again.exit_code == 1
    assert "not empty" in again.output


def test_the_same_again_is_answered_by_what_is_there(
    small_dir: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a process that was killed between the last rename and its end, its checkpoints still there."""
    out = tmp_path / "out"
    made = spectrim.tune(small_dir, str(rows_file), out, **FEW)
    (left,) = [out.parent / f"out.work/tune-{key}" for key in _keys(monkeypatch, small_dir, rows_file, out)]
    left.mkdir(parents=True)
    again = spectrim.tune(small_dir, str(rows_file), out, **FEW)
    assert again == made and "holds the result of this command already" in caplog.text and not left.exists()
    for change in ({"steps": 5}, {"seed": 3}, {"method": "full"}):
        with pytest.raises(ValueError, match="is not empty"):
            spectrim.tune(small_dir, str(rows_file), out, **{**FEW, **change})
    (out / "mine.txt").write_text("not of that run")
    with pytest.raises(ValueError, match="is not empty"):
        spectrim.tune(small_dir, str(rows_file), out, **FEW)


def test_a_training_on_other_tokens_is_another_one(
    small_dir: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same weights and file, with a tokenizer that numbers the same letters in another way."""
    copied = Path(shutil.copytree(small_dir, tmp_path / "copy"))
    before = _keys(monkeypatch, copied, rows_file, tmp_path / "one")
    file = copied / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    numbers = data["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    file.write_text(json.dumps(data), encoding="utf-8")
    after = _keys(monkeypatch, copied, rows_file, tmp_path / "two")
    assert len(before) == len(after) == 1 and before != after
    assert _keys(monkeypatch, small_dir, rows_file, tmp_path / "three") == before, "wherever the model lies"


def _keys(monkeypatch: pytest.MonkeyPatch, model: Path, rows: Path, out: Path) -> list[str]:
    """The keys that checkpoints of this tuning lie under."""
    found: list[str] = []
    original = tuning.Tuning.key
    with monkeypatch.context() as patched:
        patched.setattr(tuning.Tuning, "key", lambda self: found.append(original(self)) or found[-1])
        spectrim.tune(model, str(rows), out, **FEW)
    return sorted(set(found))
