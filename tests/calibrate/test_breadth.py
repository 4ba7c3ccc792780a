"""Changes measured block by block, all together: what they lose is what the model in memory says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.calibrate.breadth import BreadthFirst
from spectrim.calibrate.states import Streams, clear
from spectrim.calibrate.statistics import Gram
from spectrim.core import budget
from spectrim.core.meter import DepthFirst
from spectrim.core.plan import Candidate, Choice
from spectrim.core.registry import Problem
from spectrim.core.store import StoreError
from spectrim.methods.measured import MeasuredCurve
from spectrim.methods.spectrim import TwoSidedSVD
from spectrim.model import targets
from spectrim.model.blocks import share_inputs
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.live import Installed
from tests.conftest import save_model
from tests.families import FAMILIES, VOCABULARY

WINDOWS = torch.randint(1, VOCABULARY, (7, 16), generator=torch.Generator().manual_seed(2))
TRIAL, LENGTH = 5, 12  # three batches of two windows, the last one smaller
CPU = torch.device("cpu")


@dataclass
class OnDisk:
    """A checkpoint whose matrices are decomposed, measured from the disk and in memory."""

    source: Checkpoint
    folder: Path

    def __post_init__(self) -> None:
        self.structure = share_inputs(self.source.model, targets.find(self.source.model))
        self.candidates: dict[str, Candidate] = {}
        for target in self.structure.targets:
            (part,) = target.parts
            module = self.source.model.get_submodule(part.module)
            weights = {part.module: targets.oriented(module, self.source.read(f"{part.module}.weight"))}
            stats = {part.module: {Gram(): torch.eye(part.in_features, dtype=torch.float64)}}
            made = TwoSidedSVD(sided="input").decompose(target, weights, stats)
            self.candidates[target.name] = made.priced("pivot", budget.unit_cost("pivot", part))

    @property
    def names(self) -> list[str]:
        return sorted(self.candidates)

    def breadth(self, room: int = 0) -> BreadthFirst:
        live = Installed(self.source.model, self.structure, self.candidates, WINDOWS, 2)
        return BreadthFirst(self.source, live, CPU, self.folder / "streams", room)

    def depth(self) -> DepthFirst:
        live = Installed(self.source.whole(CPU), self.structure, self.candidates, WINDOWS, 2)
        return DepthFirst(live, self.structure.targets)

    def choices(self, rank: int) -> dict[str, Choice | None]:
        return {name: Choice({name: "low_rank"}, {"rank": rank + i % 3}) for i, name in enumerate(self.names)}


def on_disk(name: str, folder: Path) -> OnDisk:
    return OnDisk(Checkpoint(save_model(FAMILIES[name].make(), folder / name), torch.float32), folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    return on_disk("llama", tmp_path_factory.mktemp("breadth"))


def unheard(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_losses_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    made = on_disk(name, tmp_path)
    deep, stored = made.depth(), made.breadth()
    base = {each: choice for i, (each, choice) in enumerate(made.choices(8).items()) if i % 4}
    changed = {**made.choices(4), made.names[1]: None}
    for state, changes in (({}, made.choices(4)), (base, changed)):
        expected = dict(deep.deviations(state, changes, TRIAL, LENGTH, unheard))
        found = dict(stored.deviations(state, changes, TRIAL, LENGTH, unheard))
        assert found.keys() == expected.keys() == made.candidates.keys()
        assert found == pytest.approx(expected, rel=1e-5) and min(expected.values()) > 1e-4
        assert dict(made.breadth(10**9).deviations(state, changes, TRIAL, LENGTH, unheard)) == found
        whole = deep.deviation(state, TRIAL, LENGTH)
        assert stored.deviation(state, TRIAL, LENGTH) == pytest.approx(whole, rel=1e-5) and (whole > 0) == bool(state)
    assert not stored.folder.exists()


def test_one_block_is_in_memory_at_a_time(llama: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = llama.source.model, llama.source.load
    before: dict[str, set[str]] = {}
    seen: list[tuple[int, int]] = []

    def load(prefix: str, device: torch.device) -> None:
        before[prefix] = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
        original(prefix, device)

    monkeypatch.setattr(llama.source, "load", load)
    dict(llama.breadth().deviations({}, llama.choices(4), 2, LENGTH, lambda *told: seen.append(told)))
    ends = {"model.embed_tokens.weight", "model.norm.weight"}
    assert before == {"model.layers.0": set(), "model.layers.1": set(), "lm_head": ends}
    assert all(parameter.is_meta for parameter in model.parameters()) and seen == [(1, 2), (2, 2)]


def test_the_same_plan(llama: OnDisk) -> None:
    found = list(llama.structure.targets)
    given: dict[str, Any] = {"candidates": llama.candidates, "statistics": {}}
    method = MeasuredCurve(trial=3, rounds=1, exchange=1)
    plans = []
    for more in ({"live": llama.depth().live}, {"measures": llama.breadth()}):
        asked = Problem(found, budget.allowed(found, 0.4), "pivot", torch.Generator(), **given, **more)
        plans.append(method.allocate(asked))
    assert plans[0] == plans[1] and plans[0].choices


def broken(live: Installed, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = live.built

    def built(target: str, choice: Choice, owner: int | None = None) -> Mapping[str, Any]:
        made = honest(target, choice, owner)
        for parameter in [p for module in made.values() for p in module.parameters()] if target == name else []:
            parameter.data.fill_(torch.inf)
        return made

    monkeypatch.setattr(live, "built", built)


def test_what_breaks_is_a_loss_that_is_no_number_and_harms_no_other(
    llama: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dict(llama.breadth().deviations({}, llama.choices(4), 2, None, unheard))
    measures, bad = llama.breadth(), llama.names[2]
    broken(measures.live, bad, monkeypatch)
    found = dict(measures.deviations({}, llama.choices(4), 2, None, unheard))
    assert not math.isfinite(found.pop(bad)) and expected.pop(bad) > 0
    assert found == expected


def test_a_dense_model_that_overflows_is_an_error(llama: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama.source.load

    def load(prefix: str, device: torch.device) -> None:
        original(prefix, device)
        if prefix.endswith("1"):
            for parameter in llama.source.model.get_submodule(prefix).parameters():
                parameter.data.fill_(torch.inf)

    monkeypatch.setattr(llama.source, "load", load)
    with pytest.raises(ValueError, match=r"model\.layers\.1 gives values that are not finite on the trial windows"):
        llama.breadth().deviation(llama.choices(4), 2, None)
    assert not (llama.folder / "streams").exists()
    llama.source.release("model.layers.1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_streams_give_back_what_they_took(dtype: torch.dtype, tmp_path: Path) -> None:
    def random(seed: int) -> Tensor:
        return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)

    folder = tmp_path / "streams"
    with Streams(folder, room=random(0).nbytes) as streams:
        for turn in (0, 10):
            for stream in (0, 1):
                streams.put(stream, 4, random(turn + stream))
        assert len(streams.held) == 1 and [path.name for path in folder.iterdir()] == ["1-4"]
        for stream in (0, 1):
            assert torch.equal(streams.get(stream, 4), random(10 + stream))
            assert torch.equal(streams.get(stream, 4, 1), random(10 + stream)[1:])
    assert not folder.exists()


def test_streams_that_cannot_be_kept_say_so(tmp_path: Path) -> None:
    (tmp_path / "streams" / "0-0").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write .*0-0.*free some space"):
        Streams(tmp_path / "streams", 0).put(0, 0, torch.zeros(1, 2, 2))
    clear(tmp_path / "streams")
    folder = tmp_path / "streams"
    with Streams(folder, 0) as streams:
        streams.put(0, 0, torch.zeros(1, 2, 2))
        (folder / "0-0").write_bytes(b"short")
        with pytest.raises(StoreError, match="0-0 was cut short"):
            streams.get(0, 0)
    folder.mkdir()
    (folder / "7-1").write_bytes(b"left by a killed run")
    clear(folder)
    clear(folder)
    assert not folder.exists()
