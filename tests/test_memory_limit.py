"""A limit on memory: states in files, the same bytes, a killed run that goes on at its block; a disk too full."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spectrim
from spectrim import lean, needs
from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.states import InFiles, States
from spectrim.calibrate.statistics import Cosine, Gram
from spectrim.calibrate.streamed import streamed
from spectrim.cli import app
from spectrim.core import heap
from spectrim.core.store import Store, StoreError
from spectrim.methods import svd
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from spectrim.model.checkpoint import Checkpoint, LiveModel
from spectrim.recipe import RecipeError
from spectrim.run import Run
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY

CALIBRATION = torch.randint(1, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(2))
BLOCKS = 4
BATCHES = ["calibrate.batch=2"]
SEQUENTIAL = [*BATCHES, "calibrate.sequential=true"]
ENOUGH = "100MB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(FAMILIES["llama"].make(num_hidden_layers=BLOCKS), tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    ("given", "size"),
    [("6GB", 6 * 10**9), ("512MiB", 2**29), ("1.5 gb", 15 * 10**8), ("4096", 4096), (12, 12), ("2k", 0), ("2KB", 2000)],
)
def test_sizes(given: str | int, size: int) -> None:
    if size:
        assert needs.parse_size(given) == size
    else:
        with pytest.raises(RecipeError, match="is no size: give bytes"):
            needs.parse_size(given)


@pytest.mark.parametrize("given", ["", "GB", "-1GB", "6 gigs", "0", "0.1", "nan", "1e9"])
def test_what_is_no_size_is_an_error_before_anything_is_read(given: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        spectrim.compress("nowhere", "svd", out=tmp_path / "out", memory=given)


def test_a_limit_below_what_a_block_needs_says_how_much_that_is(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"memory 0\.0 MB is too little: this run needs 8\.\d MB .* to \w+ \("
    ) as found:
        spectrim.compress(model, "whitened", text=CALIBRATION, out=tmp_path / "out", memory=1000)
    assert "hidden states" in str(found.value)
    assert list(tmp_path.iterdir()) == []


def measured(name: str, states: States | None) -> dict[int, BlockStatistics]:
    family = FAMILIES[name].make()
    structure = share_inputs(family, targets.find(family))
    wanted = {i: Wanted(dict.fromkeys(structure.of_block(i), (Gram(),)), (Cosine(),)) for i in range(structure.count)}
    batches = [Batch(ids) for ids in CALIBRATION.split(4)]  # the last one is smaller
    return dict(streamed(LiveModel(family), structure, batches, wanted, torch.device("cpu"), states=states))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "falcon", "bloom", "mixtral"])
def test_states_in_files_give_the_same_bits(name: str, tmp_path: Path) -> None:
    expected = measured(name, None)
    one = 4 * 24 * 32 * 4
    for room in (0, one, 10 * one):
        store = Store(tmp_path / str(room))
        found = measured(name, InFiles(store, lambda block: {"of": "all"}, room))
        assert found.keys() == expected.keys()
        for index, block in expected.items():
            for key, values in block.inputs.items():
                assert torch.equal(values[Gram()], found[index].inputs[key][Gram()])
            assert torch.equal(block.block[Cosine()], found[index].block[Cosine()])
        assert [path for path in store.directory.rglob("*") if path.is_file()] == [], "all states are gone at the end"


def test_memory_holds_what_there_is_room_for(tmp_path: Path) -> None:
    states = InFiles(Store(tmp_path), lambda block: {}, room=200)
    for dtype in (torch.float32, torch.bfloat16):
        made = [torch.randn(2, 3, 8).to(dtype) for _ in range(3)]
        for i, state in enumerate(made):
            states.put(1, i, state)
        assert len(states.held) == (1 if dtype == torch.float32 else 2)
        for i, state in enumerate(made):
            assert states.get(1, i).dtype == dtype and torch.equal(states.get(1, i), state)
    assert states.first(3, 5) == 1 and states.first(4, 5) == 0 and states.first(3, 0) == 0


@pytest.mark.parametrize("settings", [BATCHES, SEQUENTIAL])
def test_a_limit_changes_no_byte(
    settings: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "room", lambda setting, limit: 0)
    for name, memory in (("free", None), ("limited", ENOUGH)):
        out = tmp_path / name
        spectrim.compress(model, "whitened", 0.3, CALIBRATION, out, settings=settings, memory=memory)
    assert tree_hash(tmp_path / "free", "run.json") == tree_hash(tmp_path / "limited", "run.json")
    assert tree_hash(tmp_path / "free.work") == tree_hash(tmp_path / "limited.work"), "no states are left"


def test_freed_memory_is_given_back_after_every_matrix(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    decompose, give_back = Run.decompose, heap.give_back
    monkeypatch.setattr(Run, "decompose", lambda *own, **more: (decompose(*own, **more), events.append("made"))[0])
    monkeypatch.setattr(heap, "give_back", lambda: (give_back(), events.append("given back"))[0])
    spectrim.compress(model, "whitened", 0.3, CALIBRATION, tmp_path / "out", settings=BATCHES, memory=ENOUGH)
    assert events.count("made") == 7 * BLOCKS
    assert all(after == "given back" for event, after in pairwise(events) if event == "made")


def interrupted(place: tuple[Any, str], at: int, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
    original, count = getattr(*place), 0

    def interrupting(*values: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return original(*values, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupting)
        with pytest.raises(KeyboardInterrupt):
            spectrim.compress(**arguments)


# where: a function, at which of its calls, and the blocks that the next run reads
KILLED = {
    "in the third block's factors": ((svd, "directions"), 2 * 7 + 3, [2, 3]),
    "before the third block's last factors": ((svd, "directions"), 3 * 7, [2, 3]),
    "among the states of the second block": ((InFiles, "put"), 3 + 3 + 2, [1, 2, 3]),
    "while old states go": ((InFiles, "finished"), 2, [2, 3]),
}


@pytest.mark.parametrize("settings", [BATCHES, SEQUENTIAL])
@pytest.mark.parametrize("place", KILLED)
def test_a_killed_run_goes_on_at_its_block(
    place: str, settings: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {
        "model": model, "recipe": "whitened", "ratio": 0.3, "text": CALIBRATION, "settings": settings, "memory": ENOUGH,
    }  # fmt: skip
    spectrim.compress(out=tmp_path / "whole", **arguments)
    where, at, blocks = KILLED[place]
    interrupted(where, at, monkeypatch, out=tmp_path / "out", **arguments)
    assert any((tmp_path / "out.work" / "states").iterdir())
    read: list[str] = []
    original = Checkpoint.load

    def load(self: Checkpoint, prefix: str, device: torch.device) -> None:
        read.append(prefix)
        original(self, prefix, device)

    monkeypatch.setattr(Checkpoint, "load", load)
    spectrim.compress(out=tmp_path / "out", **arguments)
    assert read == [f"model.layers.{block}" for block in blocks]
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")
    assert tree_hash(tmp_path / "out.work") == tree_hash(tmp_path / "whole.work")


def test_states_of_a_run_killed_at_its_very_end_go_with_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {
        "model": model, "recipe": "whitened", "text": CALIBRATION, "settings": BATCHES, "out": tmp_path / "out",
    }  # fmt: skip
    interrupted((InFiles, "finished"), BLOCKS, monkeypatch, memory=ENOUGH, **arguments)
    assert any((tmp_path / "out.work" / "states").iterdir())
    spectrim.compress(**arguments)
    assert not any((tmp_path / "out.work" / "states").iterdir())


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(lean, "free_bytes", lambda directory: size)


WIDE = {"hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("recipe", "settings"), [("whitened", []), ("whitened", SEQUENTIAL), ("svd", []), ("asvd", [])]
)
def test_factors_are_made_again_where_the_disk_is_short(
    recipe: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    wide = save_model(FAMILIES["llama"].make(**WIDE), tmp_path / "dense")
    arguments: dict[str, Any] = {
        "model": wide, "recipe": recipe, "text": CALIBRATION, "settings": settings, "format": "pivot",
    }  # fmt: skip
    spectrim.compress(ratio=0.3, out=tmp_path / "whole", **arguments)
    spectrim.compress(ratio=0.5, out=tmp_path / "smaller", **arguments)

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())

    made = calls["directions"]
    written = (tmp_path / "whole" / "model.safetensors").stat().st_size
    free(monkeypatch, written + size("whole.work") * 4 // 5)
    spectrim.compress(ratio=0.3, out=tmp_path / "out", **arguments)
    assert calls["directions"] > made + 14, "once for the spectrum, once for the cut"
    assert size("out.work") < 0.8 * size("whole.work")
    assert tree_hash(tmp_path / "out", "run.json") == tree_hash(tmp_path / "whole", "run.json")
    spectrim.compress(ratio=0.5, out=tmp_path / "again", work=tmp_path / "out.work", **arguments)
    assert tree_hash(tmp_path / "again", "run.json") == tree_hash(tmp_path / "smaller", "run.json")


def test_a_disk_too_full_for_the_least_is_said_before_anything_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(StoreError, match=r"0\.0 MB are free, and this run needs 0\.\d MB there even without stored"):
        spectrim.compress(model, "whitened", text=CALIBRATION, out=tmp_path / "out")
    assert calls == {} and not (tmp_path / "out.work").exists()


def test_the_command_line_takes_a_limit_and_says_what_each_stage_needs(model: Path, tmp_path: Path) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    options = ["--recipe", "whitened", "--sequences", "8", "--length", "24", "--memory"]
    planned = json.loads(call("plan", model, *options, "40MB", "--time", "--json").stdout)
    assert set(planned["stages"]) == {"calibrate", "decompose", "allocate", "write"}
    assert all(stage.keys() == {"memory_bytes", "disk_bytes", "seconds"} for stage in planned["stages"].values())
    shown = call("plan", model, *options, "40MB")
    assert shown.exit_code == 0 and "memory beside imports" in shown.stdout and "time" not in shown.stdout
    refused = call("compress", model, *options, "1KB", "--out", tmp_path / "out", "--text", "reference")
    assert refused.exit_code == 2 and not list(tmp_path.iterdir())


CHILD = """
import sys, resource, torch
import spectrim.methods, transformers.models.llama.modeling_llama
from pathlib import Path
from spectrim import pipeline
torch.set_num_threads(1)
ids = torch.randint(1, 512, (512, 32), generator=torch.Generator().manual_seed(0))
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
found = []
# what is imported on a first run is no part of it
pipeline.compress(sys.argv[3], "asvd", 0.3, ids[:2, :8] % 64, Path(sys.argv[1]).parent / "first")
held = peak()
for name, memory in (("limited", sys.argv[2]), ("free", None)):
    out = Path(sys.argv[1]).parent / name
    pipeline.compress(sys.argv[1], "asvd", 0.3, ids, out, memory=memory, settings=["calibrate.batch=8"])
    found.append(peak() - held)
print(*found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_holds_less_than_its_limit(llama_dir: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 128, "num_key_value_heads": 1, "vocab_size": 2048}
    dense = save_model(FAMILIES["llama_tied"].make(**sizes, head_dim=128), tmp_path / "dense")
    child = [sys.executable, "-c", CHILD, str(dense), "50MB", str(llama_dir)]
    done = subprocess.run(child, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    limited, unlimited = (int(number) for number in done.stdout.split())
    states = 512 * 32 * 512 * 4
    assert limited < 50_000_000, limited
    assert unlimited > limited + states / 4, (limited, unlimited)
