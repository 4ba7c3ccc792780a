"""A whole run of `spectrim.compress` against the parts it cannot do without, each timed alone in the same process.

The parts: the forward pass of the plain model over the calibration windows (its blocks; logits are not needed), the
Gram products in float64, the bare kernels of every matrix (as in `decompose`), and reading and writing the bytes of
the weights. Blocks are alike, so Grams and kernels are timed in some of them and scaled to all. Imports come before.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import common, decompose
from benchmarks.common import Bound, Case
from spectrim.core.budget import largest_rank
from spectrim.core.plan import Part
from spectrim.model import blocks, targets
from spectrim.pipeline import Result, compress

RATIO = 0.2
OVER_PARTS = Bound("at most", 1.2)
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 32000, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
# run first, not counted: what a process imports on its first run
WARM_UP = {**SHAPE, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
PARTS = ("forward", "gram", "kernels", "bytes")


@dataclass
class Setting:
    """A checkpoint in a folder of its own, its blocks, its windows, how many run at once, how many blocks are timed."""

    folder: Path
    count: int
    windows: Int[Tensor, "sequences length"]
    batch: int
    timed_blocks: int
    runs: int = 0
    last: Result | None = None

    @property
    def checkpoint(self) -> Path:
        """The dense model's directory."""
        return self.folder / "dense"

    def whole(self) -> None:
        """One run, with nothing kept of the runs before."""
        self.runs += 1
        settings = [f"calibrate.batch={self.batch}"]
        self.last = compress(
            self.checkpoint, "whitened", RATIO, self.windows, self.folder / f"compressed-{self.runs}", settings=settings
        )


def prepare(folder: Path, shape: dict[str, Any], sequences: int, length: int, batch: int, timed_blocks: int) -> Setting:
    """Save a Llama of random weights in bfloat16, and draw random windows."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).bfloat16().save_pretrained(folder / "dense")
    windows = torch.randint(shape["vocab_size"], (sequences, length))
    return Setting(folder, shape["num_hidden_layers"], windows, batch, timed_blocks)


def parts(setting: Setting) -> dict[str, Callable[[], object]]:
    """What a run cannot do without, each ready to be timed; Grams and kernels for the timed blocks only."""
    model = AutoModelForCausalLM.from_pretrained(setting.checkpoint, dtype=torch.float32).eval()
    structure = blocks.share_inputs(model, targets.find(model))
    matrices = [t.parts[0] for index in range(setting.timed_blocks) for t in structure.of_block(index)]
    inputs = {part.input: part.in_features for part in matrices}
    tokens = setting.batch * setting.windows.shape[1]
    rows = {width: torch.randn(tokens, width, dtype=torch.float64) for width in set(inputs.values())}
    shapes = {(part.out_features, part.in_features) for part in matrices}
    problems = {shape: _problem(*shape) for shape in shapes}
    batches = setting.windows.split(setting.batch)

    def forward() -> None:
        with torch.no_grad():
            for ids in batches:
                model.base_model(ids, use_cache=False)

    def gram() -> None:
        for width in inputs.values():
            sums = torch.zeros(width, width, dtype=torch.float64)
            for _ in batches:
                sums.addmm_(rows[width].T, rows[width])

    def kernels() -> None:
        for part in matrices:
            decompose.kernels(*problems[part.out_features, part.in_features])

    return {"forward": forward, "gram": gram, "kernels": kernels, "bytes": lambda: _copy(setting)}


def _problem(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a Gram and a left factor at the break-even rank."""
    rank = largest_rank("low_rank", Part("", out_features, in_features, ""))
    return *decompose.problem(out_features, in_features), torch.linalg.qr(torch.randn(out_features, rank)).Q


def _copy(setting: Setting) -> None:
    """Read the dense weights and write those of the compressed model to the disk."""
    for tensor in load_file(setting.checkpoint / "model.safetensors").values():
        tensor.clone()
    written = setting.folder / "bytes.safetensors"
    save_file(load_file(setting.folder / f"compressed-{setting.runs}" / "model.safetensors"), written)
    with open(written, "rb") as file:
        os.fsync(file.fileno())


def cases(setting: Setting, repeats: int, threads: int) -> list[Case]:
    """The run over the sum of its parts, with each part's share of the run."""
    torch.set_num_threads(threads)
    turns = common.in_turns({"whole": setting.whole, **parts(setting)}, repeats)
    assert setting.last is not None
    scale = setting.count / setting.timed_blocks
    for clock in (turns.wall, turns.processor):
        for name in ("gram", "kernels"):
            clock[name] = [seconds * scale for seconds in clock[name]]
    whole = statistics.median(turns.wall["whole"])
    details = {
        "seconds": common.medians(turns.wall),
        "shares": {name: round(statistics.median(turns.wall[name]) / whole, 3) for name in PARTS},
        "stages_of_last_run": setting.last.run["timings"],
        "ratio_of_processor_seconds": statistics.median(common.ratios(turns.processor, "whole", PARTS)),
    }
    values = common.ratios(turns.wall, "whole", PARTS)
    return [Case("whole run / its parts", values, threads, "ratio", OVER_PARTS, details)]


def measure() -> dict[str, object]:
    """A model of 106 M parameters, 16 windows of 256 tokens."""
    with tempfile.TemporaryDirectory(prefix="spectrim-benchmark-") as folder:
        (Path(folder) / "warm-up").mkdir()
        prepare(Path(folder) / "warm-up", WARM_UP, 2, 16, 2, 1).whole()
        made = cases(prepare(Path(folder), SHAPE, 16, 256, 8, 2), 5, 1)
    settings = {"recipe": "whitened", "ratio": RATIO, "windows": [16, 256], "stored": "bfloat16", **SHAPE}
    return common.result("whole_run", made, settings)


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
