"""Decomposition of a weight against its bare kernels, and against Cholesky whitening with an SVD.

`ours` is what a run does to one matrix: `linalg.directions` in the metric of a full Gram, then the cut at the
break-even rank, right = leftᵀ W. `kernels` is the least that must be computed: the products that form the matrix, its
`eigh`, right, and for out > in the QR before them. `cholesky` is the usual route: Cholesky of the Gram and
`torch.linalg.svd` (gesdd) of W · factor, in float64; what it would still need to form its factors is left out, in its
favour. On one thread the seconds are the processor's, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import common
from benchmarks.common import Bound, Case
from spectrim.core.budget import largest_rank
from spectrim.core.linalg import directions
from spectrim.core.plan import Part

SHAPES = ((1024, 1024), (2048, 5632), (5632, 2048))
REPEATS = (7, 5, 7)
OVER_KERNELS = Bound("at most", 1.15)
OVER_CHOLESKY = Bound("at most", 1.0)


def problem(out_features: int, in_features: int) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]]:
    """A float32 weight, and a full Gram of correlated inputs with eight channels 100 times larger than the others."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    index = torch.arange(in_features, dtype=torch.float64)
    scale = torch.exp(torch.randn(in_features, generator=generator, dtype=torch.float64))
    scale[torch.randperm(in_features, generator=generator)[:8]] *= 100
    return weight, 0.9 ** (index[:, None] - index).abs() * scale * scale[:, None]


def ours(weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], rank: int) -> Float[Tensor, "rank in"]:
    """Directions, and right at `rank`, as the whitened decomposer and `Candidate.cut` make them."""
    left = directions(weight, gram)[0].float()
    return left[:, :rank].T @ weight


def kernels(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    left: Float[Tensor, "out rank"],
) -> Float[Tensor, "rank in"]:
    """The bare kernels on the smaller side; `left` is any of the right shape."""
    matrix = weight.double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix).R
    torch.linalg.eigh(matrix @ gram @ matrix.T)
    return left.T @ weight


def cholesky(weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> Float[Tensor, "out k"]:
    """Left singular vectors by whitening: Cholesky and gesdd."""
    return torch.linalg.svd(weight.double() @ torch.linalg.cholesky(gram), full_matrices=False).U


def cases(out_features: int, in_features: int, repeats: int, threads: int) -> list[Case]:
    """Both ratios of one shape: to the kernels, and where out ≤ in to Cholesky. Bounds are for one thread."""
    torch.set_num_threads(threads)
    weight, gram = problem(out_features, in_features)
    rank = largest_rank("low_rank", Part("", out_features, in_features, ""))
    left = torch.linalg.qr(torch.randn(out_features, rank)).Q
    runs = {"ours": lambda: ours(weight, gram, rank), "kernels": lambda: kernels(weight, gram, left)}
    if out_features <= in_features:
        runs["cholesky"] = lambda: cholesky(weight, gram)
    turns = common.in_turns(runs, repeats)
    seconds = turns.processor if threads == 1 else turns.wall
    details = {"rank": rank, "seconds": common.medians(seconds)}
    bounds = {"kernels": OVER_KERNELS, "cholesky": OVER_CHOLESKY} if threads == 1 else {}
    return [
        Case(
            f"{out_features} × {in_features} / {other}",
            common.ratios(seconds, "ours", [other]),
            threads,
            bound=bounds.get(other),
            details=details,
        )
        for other in list(runs)[1:]
    ]


def measure() -> dict[str, object]:
    """All shapes on one thread; the square one on two as well."""
    cases(256, 256, 1, 1)  # not counted: loads the libraries
    made = [case for (m, n), repeats in zip(SHAPES, REPEATS, strict=True) for case in cases(m, n, repeats, 1)]
    made += cases(*SHAPES[0], 7, 2)
    return common.result("decompose", made, {"gram": "full, float64", "weight": "float32", "rank": "break-even"})


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
