"""What tests of allocators share: a work directory in memory, and a run that is stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class Remembered:
    """A work directory in memory."""

    def __init__(self) -> None:
        self.stored: dict[str, Mapping[str, Tensor]] = {}

    def __call__(
        self, name: str, fields: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        key = json.dumps([name, fields], sort_keys=True)
        if key not in self.stored:
            self.stored[key] = make()
        return self.stored[key]


class StopAtFour:
    """A progress callback that interrupts the run at the fourth step; `seen`: what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done, total))
        if done == 4:
            raise KeyboardInterrupt
