"""Eigenvectors of symmetric matrices in float64, where they are found fastest: on the GPU, or beside it.

Only some GPUs have units for float64 worth the name: by compute capability those of `FAST`, half as many as for
float32; on the others there are 32 to 64 times fewer, and a CPU is as fast. Which of the two takes a matrix
depends on the device alone, not on a measurement, so that a run gives the same bytes each time. What the GPU's solver
fails on, or answers with values that are not finite, goes to the CPU too, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

FAST = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})


def eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
    """Eigenvalues, ascending, and eigenvectors by columns, on the matrix' device; its lower triangle alone is read.

    Raises torch.linalg.LinAlgError where the CPU's solver fails too.
    """
    energies, vectors = _solved(matrix, lambda of: tuple(torch.linalg.eigh(of)))
    return energies, vectors


def eigvalsh(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    """Eigenvalues, ascending, as `eigh`."""
    (energies,) = _solved(matrix, lambda of: (torch.linalg.eigvalsh(of),))
    return energies


def is_fast(device: torch.device) -> bool:
    """Whether matrices that lie on a device are worth factorising there, in float64."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in FAST


def _solved(matrix: Tensor, solve: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if not matrix.is_cuda:
        return solve(matrix)
    if is_fast(matrix.device):
        try:
            found = solve(matrix)
        except RuntimeError as error:  # LinAlgError, and a workspace that finds no room there
            reason = str(error).partition("\n")[0]
        else:
            if bool(found[0].isfinite().all()):
                return found
            reason = "eigenvalues that are not finite"
        logger.warning("%s: eigenvectors of a matrix of %d go to the CPU: %s", matrix.device, len(matrix), reason)
    return tuple(tensor.to(matrix.device) for tensor in solve(matrix.cpu()))
