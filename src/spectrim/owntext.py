"""Text that the model writes itself (`--text self`): drawn before anything is measured, by one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim.calibrate.sampling import ends, sample, together
from spectrim.core.progress import Progress
from spectrim.data.text import SELF, parse_source
from spectrim.model.checkpoint import Weights
from spectrim.recipe import Calibrate


def sources(text: Any) -> list[str]:
    """The names of the texts that were asked for; none where token windows were given, or nothing."""
    given = [text] if isinstance(text, str) else [] if text is None or isinstance(text, Tensor) else text
    return [parse_source(name).name for name in given]


@dataclass(frozen=True)
class OwnText:
    """The dense model as a source of windows; it is in memory, whole, while it writes them."""

    source: Weights
    calibrate: Calibrate
    device: torch.device
    fingerprint: str

    def key(self, length: int) -> dict[str, Any]:
        """What its text comes from, beside the seed and how much there is of it."""
        return {
            "model": self.fingerprint, "dtype": str(self.source.model.dtype), "device": self.device.type,
            "together": self._together(length),
        }  # fmt: skip

    def _together(self, length: int) -> int:
        model = self.source.model
        return together(model.config, self.calibrate.batch, length, model.dtype.itemsize)

    def draw(self, count: int, length: int, progress: Progress) -> Int[Tensor, "count length"]:
        """So many windows. Raises ValueError as `sampling.sample`."""
        model = self.source.whole(self.device)
        return sample(model, count, length, self.calibrate.seed, self._together(length), progress)


def own_text(source: Weights, calibrate: Calibrate, text: Any, device: torch.device) -> OwnText | None:
    """What writes the text, where `self` is one of those asked for. Raises ValueError for a model that cannot."""
    if SELF not in sources(text):
        return None
    ends(source.model.config)
    return OwnText(source, calibrate, device, source.fingerprint())


def needs_tokenizer(text: Any) -> bool:
    """Whether any of the texts is to be tokenised."""
    return any(name != SELF for name in sources(text))
