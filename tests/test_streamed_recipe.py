"""Our own recipe under a limit on memory: measured block by block, the same plan, killed and gone on with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim import needs, recipe
from spectrim.calibrate.states import Streams
from spectrim.core import heap
from spectrim.estimate import Estimate, estimate
from spectrim.methods.spectrim import TwoSidedSVD
from spectrim.model.checkpoint import Checkpoint
from spectrim.recipe import RecipeError
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY

IDS = torch.randint(1, VOCABULARY, (10, 16), generator=torch.Generator().manual_seed(2))
SHORT = ["calibrate.batch=2", "groups.0.allocate.trial=3", "groups.0.allocate.rounds=1", "groups.0.allocate.exchange=1"]
INPUT = ["groups.0.decompose.sided=input"]
ENOUGH = "100MB"


@pytest.fixture
def nothing_whole(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def whole(self: Checkpoint, device: torch.device) -> None:
        raise AssertionError("the whole model is loaded")

    monkeypatch.setattr(Checkpoint, "whole", whole)
    return monkeypatch


def files(work: Path) -> list[str]:
    return sorted(path.name for kind in ("states", "streams") for path in work.glob(f"{kind}/*"))


def compressed(model: Path, name: str, out: Path, *settings: str, **more: Any) -> spectrim.pipeline.Result:
    return spectrim.compress(model, name, 0.4, IDS, out, settings=[*SHORT, *settings], **more)


@pytest.mark.parametrize("name", ["spectrim-input", "spectrim"])
def test_the_model_is_never_loaded_whole(
    name: str, llama_dir: Path, tmp_path: Path, nothing_whole: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="whole"):
        compressed(llama_dir, name, tmp_path / "free", *INPUT)
    nothing_whole.setattr(needs, "room", lambda setting, limit: 0)
    found = compressed(llama_dir, name, tmp_path / "limited", *INPUT, memory=ENOUGH)
    assert 0.39 < found.summary["ratio_actual"] < 0.43
    assert files(tmp_path / "limited.work") == []
    nothing_whole.undo()
    assert compressed(llama_dir, name, tmp_path / "free", *INPUT).plan == found.plan
    assert tree_hash(tmp_path / "free", "run.json") == tree_hash(tmp_path / "limited", "run.json")
    assert tree_hash(tmp_path / "free.work") == tree_hash(tmp_path / "limited.work"), "one key, one measurement"


def test_a_killed_run_goes_on_to_the_same_bytes(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "room", lambda setting, limit: 0)
    whole = compressed(llama_dir, "spectrim-input", tmp_path / "whole", memory=ENOUGH)
    put, left = Streams.put, 0

    def killed(self: Streams, stream: int, batch: int, state: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        put(self, stream, batch, state)

    for left in (40, 90):  # noqa: B007  it is counted down
        with monkeypatch.context() as patch:  # as SIGKILL leaves it: nothing is put away
            patch.setattr(Streams, "put", killed)
            patch.setattr(Streams, "__exit__", lambda self, *exception: None)
            with pytest.raises(KeyboardInterrupt):
                compressed(llama_dir, "spectrim-input", tmp_path / "out", memory=ENOUGH)
        assert files(tmp_path / "out.work") != []
    found = compressed(llama_dir, "spectrim-input", tmp_path / "out", memory=ENOUGH)
    assert found.plan == whole.plan and files(tmp_path / "out.work") == []
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")
    assert tree_hash(tmp_path / "out.work") == tree_hash(tmp_path / "whole.work")


# --- which sides ---


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of many blocks, so that all at once take much more than one."""
    model = FAMILIES["llama"].make(hidden_size=128, intermediate_size=320, num_hidden_layers=6)
    return save_model(model, tmp_path_factory.mktemp("models") / "llama")


def of(model: Path, *settings: str, memory: int | None = None) -> Estimate:
    asked = recipe.build("spectrim-onepass", {"sequences": 10, "length": 16}, [*SHORT, *settings])
    return estimate(model, asked, memory=memory)


def sides(found: Estimate) -> set[str]:
    return {each.sided for job in found.jobs for each in job.decomposers.values()}


def needed(found: Estimate) -> int:
    return max(sum(found.stages[name].values()) for name in ("calibrate", "decompose"))


def test_both_sides_where_they_fit_into_the_limit(wide: Path, caplog: pytest.LogCaptureFixture) -> None:
    both, one = of(wide, "groups.0.decompose.sided=both"), of(wide, *INPUT)
    limit = needed(both)
    assert needed(one) < limit / 1.3 and {"model", "statistics"} <= set(both.stages["calibrate"])
    assert sides(of(wide)) == sides(of(wide, memory=limit)) == {"both"}
    assert caplog.text == "" and of(wide).stages == both.stages
    found = of(wide, memory=limit - 1)
    assert sides(found) == {"input"}
    sizes = f"a backward pass takes {needs.shown(limit)} of memory, and a run has {needs.shown(limit - 1)}"
    assert sizes in found.structure.notes[-1] and sizes in caplog.text
    assert sides(of(wide, *INPUT, memory=limit)) == {"input"}, "what is said is done"


def test_both_sides_where_they_fit_into_the_machine(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = needed(of(wide, "groups.0.decompose.sided=both"))
    for available, found in ((limit, "both"), (limit - 1, "input")):
        monkeypatch.setattr(heap, "of_machine", lambda available=available: available)
        assert sides(of(wide)) == {found}
        assert sides(of(wide, memory=2 * limit)) == {"both"}, "a limit that is given counts alone"
        assert sides(of(wide, "groups.0.decompose.sided=both")) == {"both"}, "what is said is done"


def test_measuring_takes_a_block_and_not_two_models(wide: Path) -> None:
    long = [*INPUT, "calibrate.sequences=400", "groups.0.allocate.trial=300"]
    free, limited = of(wide, *long), of(wide, *long, memory=10**9)
    held, parameters = limited.stages["allocate"], free.totals["total_before"]
    assert free.stages["allocate"]["model"] == 2 * 4 * parameters
    assert held.keys() == {"spectra", "hidden_states", "block_weights", "compressed", "activations", "heap"}
    assert held["block_weights"] < held["compressed"] + held["block_weights"] < 4 * parameters
    streams = (6 * 7 + 2) * 300 * 16 * 128 * 4
    assert held["hidden_states"] == streams and "changed_models" not in limited.disk
    least = max(sum(stage.values()) for stage in limited.stages.values()) - streams
    scarce = of(wide, *long, memory=least + streams // 2)
    assert 0 < scarce.disk["changed_models"] < streams
    assert scarce.stage_disk["allocate"] == limited.stage_disk["allocate"] + scarce.disk["changed_models"]
    with pytest.raises(RecipeError, match=r"is too little: this run needs .* to "):
        of(wide, *long, memory=needs.HEAP)


def test_results_are_known_by_the_sides_that_were_taken(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    given: dict[str, Any] = {"work": tmp_path / "work"}
    both = compressed(llama_dir, "spectrim-onepass", tmp_path / "both", **given)
    assert not any("backward" in note for note in both.plan.notes)
    with monkeypatch.context() as patch:
        patch.setattr(heap, "of_machine", lambda: needs.HEAP)
        found = compressed(llama_dir, "spectrim-onepass", tmp_path / "found", **given)
        with pytest.raises(ValueError, match="both"):  # it holds what another machine made of the same recipe
            compressed(llama_dir, "spectrim-onepass", tmp_path / "both", **given)
    (note,) = [note for note in found.plan.notes if "backward" in note]
    assert "sided: input" in note and note in caplog.text
    one = compressed(llama_dir, "spectrim-input", tmp_path / "one", **given)
    assert one.plan.choices == found.plan.choices
    weights = [tree_hash(tmp_path / name)["model.safetensors"] for name in ("both", "found", "one")]
    assert weights[0] != weights[1] == weights[2]
    assert len(list((tmp_path / "work" / "candidate").iterdir())) == 2 * 14


def test_auto_is_decided_before_it_is_used() -> None:
    open_, both, one = (TwoSidedSVD(sided=each) for each in ("auto", "both", "input"))
    assert TwoSidedSVD() == open_ and open_.settled(True) == both and open_.settled(False) == one
    assert [each.settled(backwards) for each in (both, one) for backwards in (True, False)] == [both, both, one, one]
