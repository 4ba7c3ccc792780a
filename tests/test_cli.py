"""The command line from outside: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import spectrim
from spectrim.cli import app
from tests.families import LAYERS

COMMANDS = ("compress", "evaluate", "compare", "plan", "export", "methods", "demo")
SMALL = ["--sequences", "8", "--length", "24"]


def call(*arguments: str | Path) -> Result:
    """One command, in this process; an error that is not caught is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def from_json(result: Result) -> Any:
    """The one JSON object on stdout."""
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(spectrim.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spectrim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_lists_the_commands_at_once() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)
    # 0.5 s on a machine that does nothing else
    assert statistics.median(seconds) < 1.5


def test_help_wakes_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['spectrim', '--help']\n"
        "from spectrim.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pydantic', 'yaml', 'accelerate', 'safetensors'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(spectrim.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0 and "Usage:" in result.stdout


def test_compress_evaluate_export(llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    made = from_json(call("compress", llama_dir, "--out", out, "--text", text_file, "--ratio", "0.3", *SMALL, "--json"))
    assert made["ratio_requested"] == 0.3 and 0.3 <= made["ratio_actual"] < 0.31
    assert made["parameters"]["total_after"] < made["parameters"]["total_before"]
    assert made["run"]["peak_rss_bytes"] > 0
    on_disk = json.loads((out / "spectrim.json").read_text())
    assert {key: made[key] for key in on_disk} == on_disk

    options: list[str | Path] = ["--text", text_file, "--window", "24", "--prompt", "abc", "--json"]
    measured = from_json(call("evaluate", out, "--reference", llama_dir, *options))
    assert measured["stored"]["total"] == made["parameters"]["total_after"]
    assert measured["ratio_actual"] == made["ratio_actual"]
    assert measured["kl"] > 0 and measured["perplexity"] > 1 and measured["sample"].startswith("abc")
    whole = from_json(call("evaluate", llama_dir, "--reference", llama_dir, *options))
    assert whole["kl"] == pytest.approx(0, abs=1e-6) and "ratio_actual" not in whole

    exported = call("export", out, "--out", dense)
    assert exported.exit_code == 0 and str(dense) in exported.stdout.replace("\n", "")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (out, dense))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    again = from_json(call("evaluate", dense, *options))
    assert again["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-5)


def test_evaluate_measures_speed_against_the_model_folded_back(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrim import commands

    seen: list[Any] = []

    def fake(model: Any, dense: Any) -> dict[str, Any]:
        seen.extend([model, dense])
        return {"decode": {"ratio": 1.5}}

    monkeypatch.setattr(commands, "measure_speed", fake)
    assert call("compress", llama_dir, "--out", tmp_path / "out", "--recipe", "svd", "--ratio", "0.3").exit_code == 0
    options: list[str | Path] = ["--text", text_file, "--window", "24", "--prompt", "abc", "--speed", "--json"]
    assert from_json(call("evaluate", tmp_path / "out", *options))["speed"] == {"decode": {"ratio": 1.5}}
    model, dense = seen
    name = "model.layers.0.mlp.up_proj"
    assert type(model.get_submodule(name)).__name__ == "Pivot" or type(model.get_submodule(name)).__name__ == "LowRank"
    assert type(dense.get_submodule(name)) is torch.nn.Linear
    torch.testing.assert_close(dense.get_submodule(name).weight, model.get_submodule(name).dense())


def test_tables_go_to_stdout_and_notes_to_stderr(tmp_path: Path, text_file: Path) -> None:
    from tests.conftest import save_model
    from tests.families import FAMILIES

    experts = save_model(FAMILIES["mixtral"].make(), tmp_path / "experts")
    made = call("compress", experts, "--out", tmp_path / "out", "--recipe", "svd", "--ratio", "0.3")
    assert made.exit_code == 0
    assert "targets (parameters)" in made.stdout and "total (parameters)" in made.stdout
    assert f"experts or router, left dense: {LAYERS} modules" in made.stderr
    measured = call("evaluate", tmp_path / "out", "--text", text_file, "--window", "24", "--prompt", "abc")
    assert measured.exit_code == 0 and "perplexity" in measured.stdout


def test_plan_says_what_a_run_would_do(llama_dir: Path, tmp_path: Path) -> None:
    data = from_json(
        call("plan", llama_dir, "--recipe", "whitened", "--format", "pivot", "--ratio", "0.3", *SMALL, "--json")
    )
    assert {row["role"] for row in data["targets"]} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(row["choice"]["formats"][row["name"]] == "pivot" for row in data["targets"])
    counts = data["parameters"]
    assert counts["targets_after"] <= 0.7 * counts["targets_before"]
    assert counts["total_before"] - counts["total_after"] == counts["targets_before"] - counts["targets_after"]
    assert data["peak_memory_bytes"]["hidden_states"] == 8 * 24 * 32 * 4
    assert all(size > 0 for size in [*data["peak_memory_bytes"].values(), *data["disk_bytes"].values()])
    shown = call("plan", llama_dir, "--recipe", "whitened", "--ratio", "0.3", *SMALL)
    assert shown.exit_code == 0 and "low_rank, rank" in shown.stdout and "peak memory" in shown.stdout
    assert "decided after calibration" in call("plan", llama_dir, "--ratio", "0.3", *SMALL).stdout
    made = from_json(
        call("compress", llama_dir, "--recipe", "svd", "--out", tmp_path / "o", "--ratio", "0.3", "--json")
    )
    planned = from_json(call("plan", llama_dir, "--recipe", "svd", "--ratio", "0.3", "--json"))
    assert planned["parameters"] == made["parameters"]
    assert "hidden_states" not in planned["peak_memory_bytes"]


def test_methods_lists_what_there_is() -> None:
    data = from_json(call("methods", "--json"))
    assert {"default", "whitened", "svd"} <= data["recipe"].keys()
    assert {"svd", "whitened_svd", "fwsvd"} <= data["decomposer"].keys()
    assert "uniform" in data["allocator"]
    assert all(about for table in data.values() for about in table.values())
    shown = call("methods")
    assert shown.exit_code == 0 and "whitened_svd" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "No such command"),
        (["compress", "MODEL"], 2, "Missing option '--out'"),
        (["compress", "MODEL", "--out", "OUT", "--ratio", "much"], 2, "Invalid value for '--ratio'"),
        (["compress", "MODEL", "--out", "OUT", "--recipe", "defualt"], 2, "did you mean 'default'?"),
        (["compress", "MODEL", "--out", "OUT", "--recipe", "svd", "--ratio", "1"], 2, "groups.0.ratio"),
        (["compress", "MODEL", "--out", "OUT", "--recipe", "svd", "--ratio", "0.99"], 2, "largest possible ratio"),
        (["compress", "MODEL", "--out", "OUT", "--set", "calibrate.sequence=3"], 2, "did you mean 'sequences'?"),
        (["compress", "MODEL", "--out", "OUT", "--set", "sequences"], 2, "write it as key.key=value"),
        (["compress", "MODEL", "--out", "OUT", "--recipe", "svd", "--dtype", "int8"], 2, "no floating-point dtype"),
        (["compress", "./nowhere", "--out", "OUT"], 1, "no such model directory: ./nowhere"),
        (["compress", "MODEL", "--out", "OUT"], 1, "give --text FILE"),
        (["compress", "MODEL", "--out", "OUT", "--recipe", "svd", "--work", "FILE"], 1, "give another with --work"),
        (["evaluate", "MODEL"], 1, "give the text to measure on: --text FILE"),
        (["evaluate", "MODEL", "--text", "FILE", "--window", "49"], 1, "longer than the 48 positions"),
        (["export", "MODEL", "--out", "OUT"], 1, "no model compressed by spectrim"),
        (["export", "MODEL", "--out", "OUT", "--format", "sparse"], 2, "known is dense"),
        (["plan", "MODEL", "--ratio", "0.99"], 2, "largest possible ratio"),
    ],
)
def test_exit_codes_and_messages(
    arguments: list[str], code: int, message: str, llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    places = {"MODEL": str(llama_dir), "OUT": str(tmp_path / "out"), "FILE": str(text_file)}
    result = call(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    # usage errors come in a frame that breaks lines
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_an_interruption_ends_with_130_and_one_line(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrim.methods import svd

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(svd, "directions", interrupt)
    result = call("compress", llama_dir, "--out", tmp_path / "out", "--recipe", "svd")
    assert result.exit_code == 130
    assert result.stderr.count("\n") == 1 and "no output was written" in result.stderr


def test_a_process_of_its_own_prints_one_object_and_nothing_else() -> None:
    done = run("methods", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout).keys() == {"recipe", "decomposer", "allocator", "finetune"}
    wrong = run("plan", "somewhere", "--recipe", "defualt", "--json")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: unknown recipe 'defualt': did you mean 'default'?")
