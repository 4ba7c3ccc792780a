"""Two processes tune as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectrim
from spectrim.model import loading

SOURCE = str(Path(spectrim.__file__).parents[1])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_the_steps_of_one(small_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    """Rows of a step are shared out, the loss is a mean over all of them, and one process writes."""
    options = ["--data", str(rows_file), "--steps", "4", "--batch-size", "4", "--window", "16", "--set"]
    options += ["train.logging_steps=1", "--learning-rate", "1e-2"]
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        command += ["-m", "spectrim", "finetune", str(small_dir), "--out", str(tmp_path / str(processes)), *options]
        environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (loading.load(tmp_path / name).state_dict() for name in ("1", "2"))
    for key, tensor in two.items():
        torch.testing.assert_close(tensor, one[key], rtol=1e-3, atol=1e-5, msg=key)
    losses = []
    for name in ("1", "2"):
        record = json.loads((tmp_path / name / "spectrim.json").read_text())["finetuning"][-1]
        losses.append([entry["loss"] for entry in record["history"]])
        assert record["steps"] == len(losses[-1]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
