"""Several processes make of a model what one makes: statistics, plan and weights; one that fails ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectrim
from spectrim.model import loading
from spectrim.run import Run
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY
from tests.processes import SOURCE, compressed_together, ended, started

pytestmark = pytest.mark.distributed

# five batches of two: one process gets three of them
WINDOWS = torch.randint(1, VOCABULARY, (10, 24), generator=torch.Generator().manual_seed(2))
BATCH = "calibrate.batch=2"

RECIPES: dict[str, tuple[str, ...]] = {
    "unirank": (),
    "lorap": (),
    "fwsvd": (),
    "spectrim-onepass": ("groups.0.allocate.trial=7",),
    "bolaco": ("groups.0.allocate.evaluations=4", "groups.0.allocate.sequences=5", "groups.0.decompose.group=4"),
    "cap": ("groups.0.allocate.passes=2", "groups.0.allocate.checks=2", "groups.0.allocate.sequences=4"),
    "soco": ("groups.0.allocate.steps=6",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(FAMILIES["qwen3"].make(), tmp_path_factory.mktemp("processes") / "dense")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"ids": WINDOWS}, tmp_path / "windows.safetensors")
    return tmp_path


def a_run(model: Path, folder: Path, recipe: str, *settings: str, side: str = "two", **more: Any) -> dict[str, Any]:
    """Arguments of compress()."""
    out = folder / f"{side}-{recipe}"
    return {
        "model": str(model), "recipe": recipe, "ratio": 0.3, "out": str(out), "work": f"{out}.work",
        "settings": [BATCH, *settings], **more,
    }  # fmt: skip


def alone(run: Mapping[str, Any]) -> None:
    run = dict(run)
    spectrim.compress(run.pop("model"), run.pop("recipe"), text=WINDOWS, **run)


def dense(out: Path) -> dict[str, Tensor]:
    """The weights that the factors stand for: signs of directions, and which rows are pivots, are nobody's choice."""
    model = loading.load(out)
    if loading.is_compressed(out):
        model.dequantize()
    return dict(model.state_dict())


def plan(out: Path) -> dict[str, Any]:
    choices: dict[str, Any] = json.loads((out / "spectrim.json").read_text(encoding="utf-8"))["plan"]["choices"]
    return {name: {**choice, "error": None} for name, choice in choices.items()}


def same_output(one: Path, two: Path, tolerance: float) -> None:
    assert plan(one) == plan(two) and plan(one)
    shapes = [{n: t.shape for n, t in load_file(out / "model.safetensors").items()} for out in (one, two)]
    assert shapes[0] == shapes[1]
    expected, found = dense(one), dense(two)
    for name, tensor in expected.items():
        atol = tolerance * float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda said, name=name: f"{name}: {said}"
        )


def same_statistics(one: Path, two: Path) -> int:
    """How many the store has, the same in both to 1e-12 (of float32 sums to their rounding)."""
    files = sorted((one / "statistics").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(f.name for f in (two / "statistics").glob("*.safetensors"))
    for file in files:
        value, other = load_file(file)["value"], load_file(two / "statistics" / file.name)["value"]
        within = 1e-12 if value.dtype == torch.float64 else 1e-6
        assert float((value - other).norm() / value.norm()) <= within, file
    return len(files)


def test_two_processes_make_what_one_makes(model: Path, folder: Path) -> None:
    """Whitened SVD: streamed. Duo-SVD: deviations measured on the model, columns settled, Grams kept."""
    duo = ("groups.0.allocate.sequences=5", "groups.0.allocate.grid=[0.1,0.3,0.6]")
    runs = {"whitened": (), "duo-svd": duo}
    compressed_together(folder, [a_run(model, folder, name, *settings) for name, settings in runs.items()])
    for name, settings in runs.items():
        alone(a_run(model, folder, name, *settings, side="one"))
        same_output(folder / f"one-{name}", folder / f"two-{name}", 1e-5)
        work = [folder / f"{side}-{name}.work" for side in ("one", "two")]
        for kind in ("candidate", "deviation", "plan"):  # what is settled is keyed by errors to their last digit
            made = [sorted(path.name for path in (each / kind).glob("*")) for each in work]
            assert made[0] == made[1] and (made[0] or kind == "deviation")
        assert same_statistics(*work) == (0 if name == "whitened" else 8)
        facts = json.loads((folder / f"two-{name}" / "run.json").read_text(encoding="utf-8"))
        assert facts["hardware"]["processes"] == 2


@pytest.mark.slow
def test_a_second_pass_towards_the_dense_model(model: Path, folder: Path) -> None:
    """Two streams, gradients of the first pass, a share chosen and the result checked on text of their own."""
    settings = [f"calibrate.{key}" for key in ("sequential=true", "target=mix", "mix=auto", "select=0.4", "accept=0.2")]
    settings += ["groups.0.allocate.trial=2", "groups.0.allocate.rounds=1"]
    run = a_run(model, folder, "spectrim-onepass", *settings, memory="40MB")
    compressed_together(folder, [run])
    assert not list((folder / "two-spectrim-onepass.work" / "states").glob("*"))
    alone(a_run(model, folder, "spectrim-onepass", *settings, side="one"))
    same_output(folder / "one-spectrim-onepass", folder / "two-spectrim-onepass", 1e-4)
    work = [folder / f"{side}-spectrim-onepass.work" for side in ("one", "two")]
    made = [sorted(path.name for path in (each / "instead").glob("*")) for each in work]
    assert len(made[0]) >= 14 and len(made[0]) == len(made[1])


SCRIPT = """
import sys
from spectrim.core import distributed
from spectrim.run import Run

original = Run.decompose
def failing(self, target, *rest):
    if distributed.rank() == 1 and target.blocks == (1,):
        raise ValueError("the second process cannot go on")
    original(self, target, *rest)
if sys.argv.pop(1) == "fail":
    Run.decompose = failing
from spectrim.cli import app
app()
"""


def command(model: Path, folder: Path, out: str, text: Path, how: str = "fail") -> list[str]:
    (folder / "failing.py").write_text(SCRIPT, encoding="utf-8")
    return [
        str(folder / "failing.py"), how, "compress", str(model), "--recipe", "whitened", "--ratio", "0.3", "--text",
        str(text), "--sequences", "10", "--length", "24", "--set", BATCH, "--out", str(folder / out),
    ]  # fmt: skip


def test_a_process_that_fails_ends_the_run_with_its_error(model: Path, folder: Path, text_file: Path) -> None:
    """Nothing is half written, and one process goes on from what two have made."""
    one, two = ended(started(command(model, folder, "out", text_file)))
    assert two[0] == 1 and "error in process 1 of 2: the second process cannot go on" in two[2]
    assert one[0] == 1 and "error in process 0 of 2: another process" in one[2]
    assert "Traceback" not in one[2] + two[2] and not one[1] and not two[1]
    assert not (folder / "out").exists() and not list(folder.glob(".out*"))
    work = folder / "out.work"
    kept = set((work / "candidate").iterdir())
    assert kept and not list(work.rglob(".*"))
    options: dict[str, Any] = {"settings": [BATCH], "sequences": 10, "length": 24}
    spectrim.compress(model, "whitened", 0.3, str(text_file), folder / "out", **options)
    spectrim.compress(model, "whitened", 0.3, str(text_file), folder / "undisturbed", **options)
    same_output(folder / "undisturbed", folder / "out", 1e-5)
    assert kept <= set((work / "candidate").iterdir())


@pytest.mark.slow
def test_every_way_of_measuring_and_training_is_shared(model: Path, folder: Path) -> None:
    """Also a limit on memory (states in files), one pass after the other, and factors that are made again."""
    runs = [a_run(model, folder, name, *settings) for name, settings in RECIPES.items()]
    limited = {"memory": "40MB", "out": str(folder / "limited"), "work": str(folder / "limited.work")}
    runs.append({**a_run(model, folder, "lorap"), **limited})
    compressed_together(folder, runs)
    for name, settings in RECIPES.items():
        alone(a_run(model, folder, name, *settings, side="one"))
        trained = name in ("soco", "cap")
        same_output(folder / f"one-{name}", folder / f"two-{name}", 1e-3 if trained else 1e-5)
        same_statistics(folder / f"one-{name}.work", folder / f"two-{name}.work")
    same_output(folder / "one-lorap", folder / "limited", 1e-5)
    assert not list((folder / "limited.work" / "states").iterdir())


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_began(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second pass of a sequential run, with hidden states in files."""
    original, count = Run.decompose, 0

    def stopped(self: Run, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise ValueError("stopped")
        original(self, *arguments)

    run = a_run(model, folder, "lorap", memory="40MB")
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="stopped"):
        patched.setattr(Run, "decompose", stopped)
        alone(run)
    kept = tree_hash(folder / "two-lorap.work" / "candidate")
    assert kept
    compressed_together(folder, [run])
    alone(a_run(model, folder, "lorap", side="one"))
    same_output(folder / "one-lorap", folder / "two-lorap", 1e-5)
    assert kept.items() <= tree_hash(folder / "two-lorap.work" / "candidate").items()


KILLED = """
import os, signal, sys
from spectrim.core import distributed
from spectrim.model.checkpoint import Checkpoint
from spectrim.run import Run

folder, how = sys.argv.pop(1), sys.argv.pop(1)
original, load = Run.decompose, Checkpoint.load

def killed(self, target, *rest):
    if how == "kill" and distributed.rank() == 1 and target.blocks == (2,):
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, target, *rest)

def noted(self, prefix, device):
    with open(f"{folder}/{how}-{distributed.rank()}", "a") as file:
        file.write(f"{prefix}\\n")
    load(self, prefix, device)

Run.decompose, Checkpoint.load = killed, noted
from spectrim.cli import app
app()
"""


@pytest.mark.slow
def test_two_processes_with_a_limit_go_on_at_their_block(folder: Path, text_file: Path) -> None:
    """One is killed in the third block of four: the next two begin with that block, and come to the same bytes."""
    model = save_model(FAMILIES["llama"].make(num_hidden_layers=4), folder / "dense")
    (folder / "killed.py").write_text(KILLED, encoding="utf-8")

    def ran(how: str, out: str) -> list[tuple[int, str, str]]:
        arguments = command(model, folder, out, text_file)[2:]
        return ended(started([str(folder / "killed.py"), str(folder), how, *arguments, "--memory", "40MB"]))

    one, two = ran("kill", "out")
    assert two[0] == -signal.SIGKILL and one[0] == 1 and "error in process 0 of 2: another process" in one[2]
    work = folder / "out.work"
    assert list((work / "states").iterdir()) and not (folder / "out").exists()
    kept = tree_hash(work / "candidate")
    assert len(kept) >= 2 * 7
    assert [code for code, _, _ in ran("again", "out")] == [0, 0]
    assert [code for code, _, _ in ran("whole", "whole")] == [0, 0]
    for rank in (0, 1):
        assert (folder / f"again-{rank}").read_text(encoding="utf-8").split() == ["model.layers.2", "model.layers.3"]
        assert len((folder / f"whole-{rank}").read_text(encoding="utf-8").split()) == 4
    assert tree_hash(folder / "out", "run.json") == tree_hash(folder / "whole", "run.json")
    assert tree_hash(work) == tree_hash(folder / "whole.work"), "no states are left"
    assert kept.items() <= tree_hash(work / "candidate").items()


@pytest.mark.slow
def test_torchrun_starts_them_and_goes_on_from_what_one_made(model: Path, folder: Path, text_file: Path) -> None:
    def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*program, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    failed = torchrun(*command(model, folder, "out", text_file))
    assert failed.returncode == 1 and "the second process cannot go on" in failed.stderr
    kept = tree_hash(folder / "out.work")
    done = torchrun(*command(model, folder, "out", text_file, "go"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("targets (parameters)") == 1
    after = tree_hash(folder / "out.work")
    assert kept.items() <= after.items() and len(after) > len(kept)
    again = torchrun("-m", "spectrim", "compare", str(model), "--recipes", "svd", "--ratios", "0.2", "--out", "x")
    assert again.returncode == 1 and again.stderr.count("runs in one process: start it without torchrun") == 1
