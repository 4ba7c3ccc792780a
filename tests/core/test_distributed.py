"""Work shared by processes: what two of them train is what one trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectrim.core import distributed

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from spectrim.core import distributed
from spectrim.core.registry import Memory
from spectrim.learn.training import Batches, Trainer, passed_back


def trained():
    draw = torch.Generator().manual_seed(0)
    inputs, aims = torch.randn(7, 6, generator=draw), torch.randn(7, 4, generator=draw)
    left, right = torch.randn(4, 5, generator=draw), torch.randn(5, 6, generator=draw)
    gate, offset, seen = torch.ones(5).requires_grad_(), torch.zeros(4).requires_grad_(), []

    def loss(chosen):
        seen.append(len(chosen))
        y = torch.tanh(inputs[chosen] @ (left @ (gate[:, None] * right)).T + offset)
        return (y - aims[chosen]).square().sum(1).mean()

    def trainer(slot):
        return Trainer({"gate": gate, "offset": offset}, {"gate": 0.05, "offset": 0.02}, slot, ("loss",), every=5)

    batches, slot = Batches(torch.zeros(7, 3, dtype=torch.int64), 3, 0), Memory()
    history = trainer(slot).run(12, lambda step: {"loss": passed_back(batches.at(step), 2, loss)})
    # fewer windows than processes
    short = trainer(Memory()).run(3, lambda step: {"loss": passed_back(torch.tensor([step]), 2, loss)})
    return {
        "gate": gate.detach(), "offset": offset.detach(), "history": history, "short": short,
        "seen": torch.tensor(seen), "shared": torch.tensor(distributed.share(list(range(7)))),
        "saved": torch.tensor(slot.load() is not None),
        "summed": distributed.add_up(torch.tensor([1.0, float(distributed.rank())])),
    }


if __name__ == "__main__":
    rank, world, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=rank, world_size=world)
    assert (distributed.rank(), distributed.world(), distributed.together()) == (rank, world, True)
    save_file(trained(), f"{where}/{rank}.safetensors")
    dist.destroy_process_group()
"""


def launched(world: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """What each of `world` processes came to."""
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    limits = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = []
    for rank in range(world):
        with open(folder / f"{rank}.errors", "w", encoding="utf-8") as errors:
            command = [sys.executable, str(script), str(rank), str(world), str(folder)]
            running.append(subprocess.Popen(command, env=limits, stderr=errors))
    try:
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert not any(codes), [(folder / f"{rank}.errors").read_text(encoding="utf-8") for rank in range(world)]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


@pytest.mark.distributed
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    alone: dict[str, Any] = {"__name__": "alone"}
    exec(SCRIPT, alone)
    one = alone["trained"]()
    first, second = launched(2, tmp_path)
    for name in ("gate", "offset", "history", "short"):
        assert torch.equal(first[name], second[name]), "both have the same"
        torch.testing.assert_close(first[name], one[name], rtol=1e-6, atol=1e-6)
    assert (one["gate"] - 1).abs().max() > 0.05 and one["history"][-1] < one["history"][0]
    assert first["saved"] and not second["saved"], "one of them keeps the state"
    assert first["seen"].max() <= 2 and first["seen"].sum() > second["seen"].sum() > 0
    assert one["seen"].sum() == first["seen"].sum() + second["seen"].sum(), "no window is run twice"
    assert first["summed"].tolist() == second["summed"].tolist() == [2.0, 1.0]
    assert first["shared"].tolist() == [0, 2, 4, 6] and second["shared"].tolist() == [1, 3, 5]


def test_one_process_works_alone() -> None:
    assert (distributed.rank(), distributed.world(), distributed.together()) == (0, 1, False)
    assert distributed.share([3, 1, 2]) == [3, 1, 2]
    tensor = torch.arange(3.0)
    assert distributed.add_up(tensor) is tensor and tensor.tolist() == [0, 1, 2]
