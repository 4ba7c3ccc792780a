"""What a dry run predicts against what runs leave on disk, and what a training holds."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

import spectrim
from spectrim import recipe
from spectrim.core.budget import largest_rank
from spectrim.core.plan import Part
from spectrim.estimate import Estimate, estimate
from spectrim.methods.spectrim import TwoSidedEntries
from tests.conftest import letters, save_model
from tests.families import FAMILIES

LENGTH, SEQUENCES = 24, 16
QUICK = ["groups.0.decompose.tolerance=0.001"]
STEPS = ["groups.0.allocate.steps=8", "groups.0.allocate.batch=2"]
MIX = ["calibrate.sequential=true", "calibrate.target=mix"]
TRIAL = ["groups.0.allocate.trial=2"]
POLICY = [f"groups.0.allocate.{setting}" for setting in ("passes=1", "batch=8", "trial=2", "checks=2")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, wide enough that matrices and not names fill the files."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
    return save_model(FAMILIES["llama"].make(**sizes), folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(letters(LENGTH * SEQUENCES * 4), encoding="utf-8")
    return str(file)


def asked(name: str, settings: list[str] | None = None, format: str = "plain") -> recipe.Recipe:
    shortcuts = {"ratio": 0.4, "sequences": SEQUENCES, "length": LENGTH, "format": format}
    return recipe.build(name, shortcuts, ["calibrate.batch=4", *(settings or [])])


@pytest.mark.parametrize(
    ("name", "format", "settings"),
    [
        ("whitened", "plain", []), ("whitened", "pivot", ["calibrate.sequential=true"]), ("magnitude", "plain", []),
        ("duo-svd-columns", "plain", []), ("cap-greedy", "plain", QUICK), ("soco", "plain", STEPS),
        ("cap", "plain", [*QUICK, *POLICY]), ("unirank", "plain", MIX), ("spectrim-onepass", "pivot", [*MIX, *TRIAL]),
        ("spectrim-entries", "plain", [*TRIAL, "groups.0.decompose.steps=1"]),
    ],
)  # fmt: skip
def test_the_work_directory_has_about_the_size_that_was_predicted(
    name: str, format: str, settings: list[str], model: Path, text: str, tmp_path: Path
) -> None:
    given = asked(name, settings, format)
    guessed = estimate(model, given)
    spectrim.compress(model, given, text=text, out=tmp_path / "out", work=tmp_path / "work")
    measured = sum(file.stat().st_size for file in (tmp_path / "work").rglob("*") if file.is_file())
    assert guessed.disk["work"] + guessed.disk.get("windows", 0) == pytest.approx(measured, rel=0.2)
    windows = sum(file.stat().st_size for file in (tmp_path / "work").glob("windows/*"))
    assert 0 <= windows - guessed.disk.get("windows", 0) < 200


def of(model: Path, name: str, settings: list[str] | None = None) -> Estimate:
    return estimate(model, asked(name, settings))


def test_what_fitting_entries_holds_is_counted(model: Path) -> None:
    written = [of(model, name).stages["write"]["tensors"] for name in ("spectrim-entries", "wanda")]
    widest = TwoSidedEntries().cutting(Part("layer", 160, 96, "x"))
    assert widest == 32 * 160 * 96 + 12 * (160**2 + 96**2) and written[0] >= written[1] + widest


def test_candidates_for_learning_are_whole(model: Path) -> None:
    plain, learned = of(model, "svd"), of(model, "soco")
    parts = [t.parts[0] for t in plain.structure.targets]
    more = sum(4 * p.out_features * (min(p.out_features, p.in_features) - largest_rank("low_rank", p)) for p in parts)
    assert learned.disk["work"] - plain.disk["work"] > more > 0
    both = [of(model, "soco", [f"groups.0.format={format}"]).disk["work"] for format in ("plain", "pivot")]
    assert both[0] == both[1]


def test_memory_has_the_factors_of_all_targets_in_a_training(model: Path) -> None:
    learned, deviated, plain = of(model, "soco"), of(model, "duo-svd"), of(model, "svd")
    parts = [t.parts[0] for t in plain.structure.targets]
    factors = sum(4 * (p.out_features + p.in_features) * min(p.out_features, p.in_features) for p in parts)
    dense = sum(4 * p.parameters for p in parts)
    held = learned.stages["allocate"]
    assert held["factors"] == factors - dense
    assert held["model"] >= dense and "factors" not in {**deviated.stages["allocate"], **plain.stages["allocate"]}
    longer = of(model, "soco", ["calibrate.length=48"]).stages["allocate"]["training"]
    assert longer == 2 * held["training"] > 0
    sparse = of(model, "cap")
    assert sparse.stages["allocate"]["factors"] > 0 and sum(learned.memory.values()) > sum(plain.memory.values())


def test_a_limit_leaves_room_for_as_many_hidden_states_as_fit(model: Path) -> None:
    free = of(model, "whitened", ["calibrate.sequences=4096"])
    largest = max(sum(causes.values()) for causes in free.stages.values())
    limit = largest - 1_000_000
    limited = estimate(model, asked("whitened", ["calibrate.sequences=4096"]), memory=limit)
    assert max(sum(causes.values()) for causes in limited.stages.values()) <= limit
    states = [found.stages["calibrate"]["hidden_states"] for found in (free, limited)]
    assert states[0] - 1_100_000 < states[1] < states[0]
    assert limited.disk["hidden_states"] == 4096 * LENGTH * 96 * 4 and "hidden_states" not in free.disk
    assert limited.stage_disk["calibrate"] - free.stage_disk["calibrate"] == limited.disk["hidden_states"]
    with pytest.raises(recipe.RecipeError, match="is too little: this run needs"):
        estimate(model, asked("whitened"), memory="0.1MB")


def test_the_work_directory_at_its_fullest_with_hidden_states(tmp_path: Path, text: str) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
    three = save_model(FAMILIES["llama"].make(**sizes), tmp_path / "dense")
    guessed = estimate(three, asked("whitened"), memory="50MB")
    largest = 0

    def look(stage: str, done: int, total: int) -> None:
        nonlocal largest
        files = [file for file in (tmp_path / "work").rglob("*") if file.is_file()]
        largest = max(largest, sum(file.stat().st_size for file in files))

    spectrim.compress(
        three, asked("whitened"), text=text, out=tmp_path / "out", work=tmp_path / "work", memory="50MB", progress=look
    )
    assert guessed.stage_disk["decompose"] == pytest.approx(largest, rel=0.2)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_a_configuration_is_enough(family: str, tmp_path: Path) -> None:
    whole = save_model(FAMILIES[family].make().bfloat16(), tmp_path / "whole")
    (bare := tmp_path / "bare").mkdir()
    shutil.copy(whole / "config.json", bare)
    for name in ("whitened", "soco", "fwsvd"):
        with_weights, without = of(whole, name).to_json(), of(bare, name).to_json()
        for found in (with_weights, without):
            found["peak_memory_bytes"].pop("imports")
        (note,) = set(without.pop("notes")) - set(with_weights.pop("notes"))
        assert str(bare) in note and "no weights" in note and "bfloat16" in note
        assert without == with_weights
    with pytest.raises(ValueError, match=r"bare holds no weights.*Plan without --time"):
        estimate(bare, asked("whitened"), time=True)


def test_a_configuration_without_weights_is_of_the_size_it_says_and_holds_no_memory(tmp_path: Path) -> None:
    """70 B parameters, of which not one is made."""
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = of(tmp_path, "whitened")
    assert found.totals["total_before"] == 70_553_706_496 and len(found.to_json()["targets"]) == 560
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30


@pytest.mark.parametrize("there", ["pytorch_model.bin", "model.safetensors.index.json", "other.safetensors"])
def test_weights_that_are_not_whole_are_no_configuration_alone(there: str, model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    (tmp_path / there).write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        estimate(tmp_path, asked("whitened"))


def test_a_configuration_that_no_model_has_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        estimate(tmp_path, asked("svd"))


def test_times_of_all_stages_once_a_block_was_timed(model: Path) -> None:
    found = estimate(model, asked("whitened"), time=True)
    assert set(found.seconds) == {"fingerprint", "calibrate", "decompose", "allocate", "write"}
    assert all((found.seconds[name] or 0) > 0 for name in ("calibrate", "decompose", "write"))
    assert found.to_json()["stages"]["decompose"]["seconds"] == found.seconds["decompose"]
    assert of(model, "whitened").seconds == {} and "seconds" not in of(model, "whitened").to_json()
    gradients = estimate(model, asked("fwsvd"), time=True).seconds
    assert gradients["calibrate"] is None and gradients["allocate"] == 0.0
    assert estimate(model, asked("svd"), time=True).seconds["calibrate"] == 0
