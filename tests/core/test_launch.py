"""What the environment says of how a process was started."""

from __future__ import annotations

import pytest

from spectrim.core import launch

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_first_and_has_no_number() -> None:
    launch.alone("compare")
    assert launch.processes() == 1 and launch.first() and launch.which() == ""


@pytest.mark.parametrize("lacking", TORCHRUN)
def test_what_torchrun_sets_is_wanted_whole(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job systems set some of it for programs that never meet."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, "" if name == lacking else value)
    assert launch.processes() == 1 and launch.first()


def test_several_processes_know_their_number_and_are_refused_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch.processes() == 2 and not launch.first() and launch.which() == " in process 1 of 2"
    with pytest.raises(ValueError, match="compare runs in one process: start it without torchrun"):
        launch.alone("compare")
    monkeypatch.setenv("RANK", "0")
    assert launch.first() and launch.of_this_machine() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch.of_this_machine() == 2
    monkeypatch.delenv("MASTER_PORT")
    assert launch.of_this_machine() == 1, "one that meets nobody shares its machine with none"
