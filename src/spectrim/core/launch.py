"""How this process was started: alone or by torchrun among others, from the environment; torch is not imported."""

from __future__ import annotations

import os

# What torchrun sets, and what processes need to meet.
NEEDED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


def processes() -> int:
    """How many processes were started together; 1 for one by itself."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in NEEDED) else 1


def of_this_machine() -> int:
    """How many of the processes run on this machine, as torchrun says; 1 where nothing says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if processes() > 1 else 1


def first() -> bool:
    """Whether this process is the one that speaks for all."""
    return processes() == 1 or os.environ["RANK"] == "0"


def alone(command: str) -> None:
    """Raise ValueError among several processes, all of which would do the same and write the same files."""
    if processes() > 1:
        raise ValueError(
            f"{command} runs in one process: start it without torchrun. compress and finetune are what several share"
        )


def which() -> str:
    """Which of several this is, for messages; empty for one alone."""
    return "" if processes() == 1 else f" in process {os.environ['RANK']} of {processes()}"
