"""The table of measured deviations, each run from the block of its target on, against full forward passes.

Both measure the same choices of the same targets on a generated Llama of 16 blocks, build each choice's modules once,
and swap them in and out of one model. By full passes every choice runs all blocks from the first; in its favour the
dense model's log-probabilities are kept there, while by blocks they are computed anew for every target.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from benchmarks.common import Bound, Case
from spectrim.core import budget
from spectrim.core.meter import Meter, compare, total
from spectrim.core.registry import Problem
from spectrim.methods.deviation import Deviation, base_of
from spectrim.methods.svd import PlainSVD
from spectrim.model import targets
from spectrim.model.live import Installed

RATIO = 0.2
OVER_FULL = Bound("at most", 0.65)
METHOD = Deviation(grid=(0.0, 0.2, 0.4, 0.6, 0.8), sequences=2)
WINDOWS = (2, 64)
SHAPE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip

Table = dict[str, list[float]]


def problem(shape: Mapping[str, Any], windows: tuple[int, int]) -> Problem:
    """A Llama of random weights with the plain SVD of every target, and random tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    structure, candidates = targets.find(model), {}
    for target in structure.targets:
        weights = {target.name: model.get_submodule(target.name).weight.detach()}
        candidates[target.name] = PlainSVD().decompose(target, weights, {target.name: {}})
    live = Installed(model, structure, candidates, torch.randint(shape["vocab_size"], windows), windows[0])
    allowed = budget.allowed(structure.targets, RATIO)
    generator = torch.Generator().manual_seed(0)
    return Problem(structure.targets, allowed, "low_rank", generator, candidates=candidates, live=live)


def table_by_blocks(asked: Problem, method: Deviation) -> Table:
    """Deviations of every choice of every target, as the allocator measures them."""
    meter, options = _meter(asked, method), method.options(asked)
    return {target.name: meter.of_target(target, list(options[target.name].values())) for target in asked.targets}


@torch.no_grad()
def table_by_full_forwards(asked: Problem, method: Deviation) -> Table:
    """The same by a whole forward pass each; `kl` only."""
    meter, options, live = _meter(asked, method), method.options(asked), asked.live
    assert live is not None and method.deviation == "kl"
    dense = [
        torch.log_softmax(live.logits(ids, live.run(ids, live.enter(ids), 0, live.blocks)).float(), -1)
        for ids in meter.batches
    ]
    found: Table = {}
    for target in asked.targets:
        found[target.name] = []
        for choice in options[target.name].values():
            modules = {} if choice is None else live.built(target.name, choice)
            sums = torch.zeros(2, dtype=torch.float64)
            with meter.in_base(target.name), live.swapped(modules):
                for ids, reference in zip(meter.batches, dense, strict=True):
                    state = live.run(ids, live.enter(ids), 0, live.blocks)
                    sums += compare("kl", live, ids, state, reference)
            found[target.name].append(total("kl", sums))
    return found


def _meter(asked: Problem, method: Deviation) -> Meter:
    assert asked.live is not None
    return Meter(asked.live, method.deviation, base_of(asked), method.sequences, method.length)


def cases(shape: Mapping[str, Any], windows: tuple[int, int], repeats: int, threads: int) -> list[Case]:
    """The seconds of the table by blocks over those by full forward passes."""
    torch.set_num_threads(threads)
    asked, tables = problem(shape, windows), dict[str, Table]()
    runs = {
        "by blocks": lambda: tables.update(blocks=table_by_blocks(asked, METHOD)),
        "by full passes": lambda: tables.update(full=table_by_full_forwards(asked, METHOD)),
    }
    turns = common.in_turns(runs, repeats)
    seconds = turns.processor if threads == 1 else turns.wall
    apart = max(
        abs(one - other)
        for name, row in tables["blocks"].items()
        for one, other in zip(row, tables["full"][name], strict=True)
    )
    details = {
        "seconds": common.medians(seconds),
        "measured": sum(len(row) for row in tables["full"].values()),
        "largest_difference": apart,
    }
    name = f"{shape['num_hidden_layers']} blocks / full passes"
    return [
        Case(name, common.ratios(seconds, "by blocks", ["by full passes"]), threads, bound=OVER_FULL, details=details)
    ]


def measure() -> dict[str, object]:
    """16 blocks on one thread."""
    settings = {**SHAPE, "windows": WINDOWS, "grid": METHOD.grid, "ratio": RATIO}
    return common.result("deviation", cases(SHAPE, WINDOWS, 5, 1), settings)


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
