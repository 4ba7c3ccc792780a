"""Speed of a low rank + sparse layer against the dense one of its shape: decode, a few tokens, prefill.

Entries are at random places and of random values: speed does not depend on them. Half of the parameters are removed;
the share that is kept as entries of the sparse part varies, the rest is the pair's rank. Every call goes through
several layers of one kind, as in a model, so that their weights come from memory and not from the processor's cache.
The figure is the seconds of the dense layers over those of the compressed ones.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Bound, Case
from spectrim.model import modules

RATIO = 0.5
SHAPES = ((2048, 2048), (5632, 2048))  # out × in
DTYPES = (torch.float32, torch.bfloat16)
SHARES = (0.02, 0.05, 0.1, 0.25)
TOKENS = (1, 16, 256)
BYTES = 2**26  # of dense weights a call goes through, at least
NO_SLOWER = Bound("at least", 1.0)


def layer(kind: str, out_features: int, in_features: int, share: float, dtype: torch.dtype) -> modules.Format:
    """A compressed layer whose parameters are half of the dense ones, the `share` of them entries."""
    parameters, nnz = out_features * in_features, int(share * out_features * in_features)
    kept = int((1 - RATIO) * parameters) - nnz
    rank = next(
        rank
        for rank in range(min(out_features, in_features), -1, -1)
        if rank * (out_features + in_features) - rank**2 * (kind == "pivot_sparse") <= kept
    )
    index = modules.smaller_index(out_features, in_features, nnz)
    spec = {"format": kind, "in": in_features, "out": out_features, "bias": False}
    module = modules.empty({**spec, "rank": rank, "nnz": nnz, "index": index}, dtype=dtype)
    state = module.state_dict()
    for name, tensor in state.items():
        state[name] = torch.randn_like(tensor) * 0.02 if tensor.is_floating_point() else torch.randperm(out_features)
    entries = torch.randperm(parameters)[:nnz].sort().values
    state |= modules.stored_index(module.spec(), entries)
    module.load_state_dict(state)
    module.derive()
    return module


def _through(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for module in layers:
                module(x)

    return run


def cases(
    shape: tuple[int, int], dtype: torch.dtype, share: float, tokens: Sequence[int], repeats: int, count: int
) -> list[Case]:
    """Both sparse formats against dense, in turns: a case per number of tokens; `count` layers of each kind."""
    out_features, in_features = shape
    first: dict[str, nn.Module] = {
        "dense": nn.Linear(in_features, out_features, bias=False, dtype=dtype),
        "low_rank_sparse": layer("low_rank_sparse", out_features, in_features, share, dtype),
        "pivot_sparse": layer("pivot_sparse", out_features, in_features, share, dtype),
    }
    layers = {name: [module, *(copy.deepcopy(module) for _ in range(count - 1))] for name, module in first.items()}
    made = []
    for number in tokens:
        x = torch.randn(number, in_features, dtype=dtype)
        runs = {name: _through(kind, x) for name, kind in layers.items()}
        for run in runs.values():
            run()
        seconds = common.in_turns(runs, repeats).processor
        values = common.ratios(seconds, "dense", ["low_rank_sparse"])
        details: dict[str, Any] = {
            "pivot_sparse": statistics.median(common.ratios(seconds, "dense", ["pivot_sparse"])),
            "milliseconds": {name: round(statistics.median(s) * 1e3 / count, 3) for name, s in seconds.items()},
            "ranks": {name: module.spec()["rank"] for name, module in first.items() if name != "dense"},  # type: ignore[operator]
        }
        size = f"{out_features}x{in_features} {str(dtype).removeprefix('torch.')}"
        name = f"{size} {share * 100:g} % {number} token{'s' * (number > 1)}"
        made.append(Case(name, values, 1, "ratio", bound(dtype, share, number), details))
    return made


def bound(dtype: torch.dtype, share: float, tokens: int) -> Bound | None:
    """What docs/formats.md claims: in bfloat16 only prefill with few entries is surely no slower than dense."""
    return NO_SLOWER if dtype == torch.float32 or (tokens == max(TOKENS) and share <= 0.05) else None


def measure() -> dict[str, object]:
    """Every shape, dtype, share and number of tokens, seven turns each."""
    torch.manual_seed(0)
    made = []
    for shape in SHAPES:
        for dtype in DTYPES:
            count = -(-BYTES // (shape[0] * shape[1] * dtype.itemsize))
            for share in SHARES:
                made += cases(shape, dtype, share, TOKENS, 7, count)
    return common.result("sparse", made, {"ratio": RATIO, "index": "the smaller one", "dense_bytes": BYTES})


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
