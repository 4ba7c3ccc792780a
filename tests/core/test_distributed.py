"""Work shared by processes: what two of them train is what one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectrim.core import distributed
from spectrim.core.delivery import in_turn
from tests.processes import ended, started

SCRIPT = """
import json
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


def failed(work):
    try:
        with distributed.alike():
            work()
    except Exception as error:
        return type(error).__name__, str(error)
    return ""


def said():
    rank = distributed.rank()

    def fail(*ranks):
        if rank in ranks:
            raise ValueError("it cannot be")

    def cut():
        return {"a": {"left": torch.arange(3.0), "columns": torch.zeros(0, dtype=torch.int64)}}

    made = {name: {k: t.tolist() for k, t in of.items()} for name, of in distributed.cut_by(1, cut).items()}
    return {
        "agreed": distributed.agreed(lambda: f"of {rank}"), "gathered": distributed.gathered(rank), "cut": made,
        "none": failed(lambda: None), "both": failed(lambda: fail(0, 1)), "second": failed(lambda: fail(1)),
        "first": failed(lambda: distributed.agreed(lambda: fail(0))),
        "different": failed(lambda: distributed.same({"the text": str(rank), "the recipe": "one"})),
    }


def delivered(broken):
    from spectrim.model.writer import Item, delivered

    def make(number):
        if number == broken and distributed.rank() == 1:
            raise ValueError(f"number {number} cannot be made")
        made.append(number)
        return {"w": torch.full((2, number), number, dtype=torch.bfloat16), "bias": torch.full((number,), 1.0)}

    def shapes(number):
        return {"w": (torch.bfloat16, (2, number)), "bias": (torch.float32, (number,))}

    made, taken = [], []

    def work():
        items = [Item(shapes(number), lambda number=number: make(number)) for number in range(6)]
        with delivered(items, [0, 1, 1, 1, 1, 1]) as ready:
            for item in ready:
                found = item.make()
                assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == dict(item.shapes)
                taken.append([float(found["w"].sum()), float(found["bias"].sum())])

    return {"failed": failed(work), "made": made, "taken": taken}


if __name__ == "__main__":
    rank, world, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=rank, world_size=world)
    assert (distributed.rank(), distributed.world(), distributed.together()) == (rank, world, True)
    save_file(trained(), f"{where}/{rank}.safetensors")
    with open(f"{where}/{rank}.json", "w") as file:
        json.dump({"said": said(), "whole": delivered(None), "broken": delivered(3)}, file)
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


@pytest.mark.slow
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
    _agree(*(json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)))


def _agree(one: Any, two: Any) -> None:
    """What processes say to each other, and what they deliver."""
    for heard in (one["said"], two["said"]):
        assert heard["agreed"] == "of 0" and heard["gathered"] == [0, 1] and heard["none"] == ""
        assert heard["cut"] == {"a": {"left": [0, 1, 2], "columns": []}}
        assert (
            heard["different"][1].count("the text") == (heard is one["said"]) and "recipe" not in heard["different"][1]
        )
    for name, firsts, seconds in (
        ("both", "ValueError", "Lost"), ("second", "Lost", "ValueError"), ("first", "ValueError", "Lost"),
        ("different", "ValueError", "Lost"),
    ):  # fmt: skip
        assert (one["said"][name][0], two["said"][name][0]) == (firsts, seconds), name
    assert one["whole"]["taken"] == [[2.0 * n * n, n] for n in range(6)]
    assert one["whole"]["made"] == [0, 2, 4] and two["whole"]["made"] == [1, 3, 5] and not two["whole"]["failed"]
    assert one["broken"]["failed"][0] == "Lost" and two["broken"]["failed"] == ["ValueError", "number 3 cannot be made"]
    assert one["broken"]["taken"] == [[2.0 * n * n, n] for n in range(3)]


@pytest.mark.parametrize(
    ("count", "unit", "world"), [(5, 1, 2), (1, 1, 3), (10, 4, 2), (0, 1, 2), (9, 4, 4), (64, 1, 7)]
)
def test_portions_are_neighbours_in_whole_units(
    count: int, unit: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(distributed.portion(count, unit))
    assert [number for portion in found for number in portion] == list(range(count))
    assert all(portion.start % unit == 0 for portion in found if len(portion))
    units = [-(-len(portion) // unit) for portion in found]
    assert max(units) - min(units) <= 1


def test_the_costly_are_dealt_first_and_loads_are_even() -> None:
    costs = [1.0, 1.0, 1.0, 1.0, 2.75, 2.75, 2.75]
    owners = distributed.deal(costs, [0.0, 0.0])
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert sorted(loads) == [5.75, 6.5]
    assert distributed.deal([1.0], [3.0, 1.0, 2.0]) == [1], "who has done least so far"
    assert distributed.deal(costs, [7.0]) == [0] * 7


def test_every_process_gets_deliveries_and_what_costs_nothing_stays() -> None:
    assert in_turn([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0], 3) == [0, 2, 1, 0, 2, 0, 1]


def test_one_process_works_alone() -> None:
    assert (distributed.rank(), distributed.world(), distributed.together()) == (0, 1, False)
    assert distributed.share([3, 1, 2]) == [3, 1, 2]
    tensor = torch.arange(3.0)
    assert distributed.add_up(tensor) is tensor and tensor.tolist() == [0, 1, 2]


LEFT = """
import atexit, sys
import torch
from spectrim.core import distributed

atexit.register(lambda: print("together at the end:", distributed.together()))
assert distributed.join(torch.device("cpu"))
assert distributed.gathered(distributed.rank()) == [0, 1]
assert not distributed.join(torch.device("cpu"))
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("code", [0, 3])
def test_the_others_are_left_before_the_interpreter_goes(tmp_path: Path, code: int) -> None:
    """Threads of gloo that outlive it end about every seventh process by SIGABRT."""
    (script := tmp_path / "script.py").write_text(LEFT, encoding="utf-8")
    assert [(ends, said) for ends, said, _ in ended(started([str(script), str(code)]))] == [
        (code, "together at the end: False\n")
    ] * 2
