"""The benchmark of killed runs, on programs that behave as runs do; whether its bounds hold is not asked here."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import pytest

from benchmarks import common, kills
from benchmarks.kills import Command, Kill, Undisturbed

# stores ten artifacts, a moment each, those that are there before passed over; `forgetful` counts what it made itself
RUN = """
import sys, time
from pathlib import Path
out, forgetful = Path(sys.argv[1]), sys.argv[2:] == ["forgetful"]
(work := Path(f"{out}.work") / "kind").mkdir(parents=True, exist_ok=True)
made = 0
for i in range(10):
    time.sleep(0.03)
    if not (work / str(i)).exists():
        (work / str(i)).write_text(str(i))
        made += 1
out.mkdir()
(out / "run.json").write_text(str(time.time()))
(out / "made").write_text(str(made if forgetful else 10))
time.sleep(0.1)
"""


def program(*more: str) -> Command:
    return lambda out: [sys.executable, "-c", RUN, str(out), *more]


def test_kills_of_a_run_that_goes_on_and_of_one_that_does_not(tmp_path: Path) -> None:
    found = kills.kills({"steady": program(), "forgetful": program("forgetful")}, 6, 0, tmp_path)
    assert {name: len(of) for name, of in found.items()} == {"steady": 3, "forgetful": 3}
    for name, of in found.items():
        for each in of:
            assert 0 < each.artifacts <= 10 and each.seconds > 0
            assert each.same is (name == "steady")
    steady, forgetful, late = [json.loads(json.dumps(case.to_json())) for case in kills.cases(found)]
    assert (steady["value"], steady["holds"], steady["repeats"]) == (1.0, True, 3)
    assert (forgetful["value"], forgetful["holds"]) == (0.0, False)
    assert (late["value"], late["holds"], late["bound"]["limit"]) == (6.0, True, 4.5)
    assert kills.table(found).splitlines()[2:] == [
        "| steady | 3 | 3 | 3 |",
        "| forgetful | 3 | 3 | 0 |",
        "| all | 6 | 6 | 3 |",
    ]


def test_an_early_kill_comes_before_the_first_artifact_mostly(tmp_path: Path) -> None:
    class Soon(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return a

    alone = kills.undisturbed(program(), tmp_path / "alone")
    assert 0 < alone.first < alone.seconds and alone.output.keys() == {"made"}
    made = kills.kill(program(), tmp_path / "out", alone, True, Soon())
    assert isinstance(made, Kill) and made == Kill(made.seconds, 0, True)
    (late,) = kills.cases({"one": [made]})[1:]
    assert late.bound is not None and not late.bound.holds(late.value)


def test_a_run_that_is_over_is_no_kill_and_one_that_fails_is_an_error(tmp_path: Path) -> None:
    alone = kills.undisturbed(program(), tmp_path / "alone")
    late = Undisturbed(10 * alone.seconds + 60, 0.0, alone.output)

    class Latest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    begin = time.perf_counter()
    made = kills.kill(program(), tmp_path / "late", late, False, Latest())
    assert isinstance(made, Undisturbed) and made.output == alone.output and 0 < made.first < made.seconds
    assert time.perf_counter() - begin < late.seconds, "it does not wait for what is over"
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*no such thing"):
        kills.undisturbed(lambda out: [sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "bad")


def test_a_run_that_is_over_gives_the_next_ones_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = kills.undisturbed

    def slower(of: Command, out: Path) -> Undisturbed:
        found = slow(of, out)
        return Undisturbed(1000 * found.seconds, found.first, found.output)

    monkeypatch.setattr(kills, "undisturbed", slower)
    assert len(kills.kills({"steady": program()}, 1, 0, tmp_path)["steady"]) == 1
    monkeypatch.setattr(kills, "undisturbed", lambda of, out: Undisturbed(1000, 0.1, {"made": "something else"}))
    with pytest.raises(RuntimeError, match="give different bytes"):
        kills.kills({"again": program()}, 1, 0, tmp_path)


def test_the_commands_are_those_of_the_command_line() -> None:
    for recipe, settings in kills.RECIPES.items():
        made = list(kills.command(recipe)(Path("small")))
        assert made[1:5] == ["-m", "spectrim", "compress", "reference"] and made[-2:] == ["--out", "small"]
        assert made[made.index("--recipe") + 1] == recipe and made.count("--set") == len(settings)


@pytest.mark.slow
def test_runs_of_the_bundled_model(tmp_path: Path) -> None:
    common.run_module("kills", str(tmp_path / "kills.json"), "--kills", "2", "--recipes", "whitened")
    (case, late) = json.loads((tmp_path / "kills.json").read_text(encoding="utf-8"))["cases"]
    assert case["name"] == "whitened" and case["holds"] and case["repeats"] == 2 and late["value"] >= 0
