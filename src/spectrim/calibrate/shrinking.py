"""Statistics as decomposers are given them: matrices pulled to what a text that was not seen is sure to have too.

What is stored is what was measured; it is shrunk whenever it is handed on. So runs of other strengths share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spectrim.calibrate.statistics import Towards

ByModule = Mapping[str, Mapping[Any, Tensor]]


@dataclass(frozen=True)
class Shrinking:
    """share: 0, nothing is changed, to 1, nothing but what it is shrunk to stays; to: see `Statistic.shrunk`."""

    share: float = 0.0
    to: Towards = "identity"

    def of(self, measured: ByModule) -> dict[str, dict[Any, Tensor]]:
        """Statistics by module, those that shrink shrunk; of modules that share a tensor, one is made."""
        made: dict[tuple[Any, int], Tensor] = {}
        return {
            module: {statistic: self._given(statistic, value, made) for statistic, value in found.items()}
            for module, found in measured.items()
        }

    def _given(self, statistic: Any, value: Tensor, made: dict[tuple[Any, int], Tensor]) -> Tensor:
        if not (self.share and statistic.shrinks):
            return value
        key = (statistic, id(value))
        if key not in made:
            made[key] = statistic.shrunk(value, self.share, self.to)
        return made[key]

    def key(self, needs: Iterable[Any]) -> dict[str, str]:
        """What tells in a key what was made of statistics, shrunk; empty where none of them shrinks."""
        return {"shrunk": f"{self.share!r} {self.to}"} if self.share and any(s.shrinks for s in needs) else {}
