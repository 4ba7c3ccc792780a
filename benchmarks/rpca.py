"""Robust PCA of a weight against the bare singular value decompositions that its iterations make.

`ours` is `rpca.robust_pca` until its residual is at most 1e-4. `kernels` is one bare decomposition as an iteration
needs it, all singular values and vectors of both sides, by `eigh` of the Gram in float64; the figure is ours over as
many of these as there were iterations. `svd` is `torch.linalg.svd` (gesdd) of the same matrix, for comparison alone.
On one thread the seconds are the processor's, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import common
from benchmarks.common import Bound, Case
from spectrim.core.rpca import Mode, robust_pca

SIZE, TOLERANCE, ITERATIONS = 2048, 1e-4, 200
# Bare decompositions timed in each turn: their mean counts.
BARE = 3
REPEATS: dict[Mode, int] = {"inexact": 3, "fixed": 1}
OVER_KERNELS = Bound("at most", 1.3)


def problem(size: int) -> Float[Tensor, "size size"]:
    """A float32 weight of a few strong directions, noise, and one large entry in a hundred."""
    generator = torch.Generator().manual_seed(0)
    few = max(1, size // 64)
    weight = torch.randn(size, few, generator=generator) @ torch.randn(few, size, generator=generator) / few**0.5
    weight += torch.randn(size, size, generator=generator)
    return weight + 10 * torch.randn(size, size, generator=generator) * (
        torch.rand(size, size, generator=generator) < 0.01
    )


def kernels(matrix: Float[Tensor, "rows columns"], times: int) -> Float[Tensor, "rows columns"]:
    """Singular values and vectors of both sides, so many times over; rows ≤ columns."""
    for _ in range(times):
        energies, vectors = torch.linalg.eigh(matrix @ matrix.T)
        right = vectors.T @ matrix / energies.clamp_min(torch.finfo(energies.dtype).tiny).sqrt()[:, None]
    return right


def case(size: int, mode: Mode, repeats: int) -> Case:
    """The ratio at one size, on one thread."""
    torch.set_num_threads(1)
    weight = problem(size)
    exact, found = weight.double(), robust_pca(weight[:8, :8], mode=mode)

    def ours() -> None:
        nonlocal found
        found = robust_pca(weight, mode=mode, tolerance=TOLERANCE, iterations=ITERATIONS)

    runs = {
        "ours": ours,
        "kernels": lambda: kernels(exact, BARE),
        "svd": lambda: torch.linalg.svd(exact, full_matrices=False),
    }
    seconds = common.in_turns(runs, repeats).processor
    assert found.residual <= TOLERANCE, f"{mode} ended at a residual of {found.residual}"
    bare = [each / BARE for each in seconds["kernels"]]
    values = tuple(each / (found.iterations * one) for each, one in zip(seconds["ours"], bare, strict=True))
    details = {
        "iterations": found.iterations, "residual": found.residual, "rank": found.left.shape[1],
        "density": float((found.sparse != 0).double().mean()),
        "seconds": common.medians({**seconds, "kernels": bare}),
    }  # fmt: skip
    return Case(f"{size} × {size} {mode} / bare decompositions", values, 1, bound=OVER_KERNELS, details=details)


def measure() -> dict[str, object]:
    """Both modes at 2048²."""
    case(128, "fixed", 1)  # not counted: loads the libraries
    made = [case(SIZE, mode, repeats) for mode, repeats in REPEATS.items()]
    return common.result("rpca", made, {"weight": "float32", "tolerance": TOLERANCE})


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
