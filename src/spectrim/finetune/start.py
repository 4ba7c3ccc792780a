"""What may be done to factors before they are tuned: balancing, which keeps the function, and flatter spectra.

`balanced`: each pair becomes U√σ, √σVᵀ of its own product. The gradients of the two factors are then of one size, and
each has the square root of the condition of the product. It is the spectral form of what `core.plan.balance` does
direction by direction.

`refined` is singular value scaling (Kim and Yoo, AAAI 2025, arXiv 2412.17387): the singular vectors stay, and

    σ′ = c · σ^(1 − blend (1 − exponent)),    published: exponent ½, blend 1, c = 1, of every weight and bias.

It flattens the spectrum, so that dominating directions dominate less when the tuning starts, and it does change the
function: published for image generators, which are tuned long after it, not for language models. Ours: `blend`, of
which 0 changes nothing; c, which gives the Frobenius or the spectral norm back; directions of σ ≤ 1e-6 σ_1 are noise,
which a root would blow up, and stay as they are. Kept columns, sparse values, norms, embeddings and the output head are
left alone, and a fused matrix is taken as one.

Costs: of a pair QR of both factors and an SVD of r × r, float64; of a dense layer its own SVD, float64.
"""

from __future__ import annotations

import logging
import math

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.finetune import factored
from spectrim.finetune.parts import PIVOTS, decomposed, factored_svd, pair, parts_of, put
from spectrim.model.modules import Format, is_transposed

NORMS = ("fro", "none", "spectral")
# The share of the largest singular value up to which one is noise, and stays.
NOISE = 1e-6
# What the norm of a bias is never below (public code).
LEAST = 1e-8

logger = logging.getLogger(__name__)


@torch.no_grad()
def balanced(model: PreTrainedModel) -> list[str]:
    """Make every pair U√σ, √σVᵀ of its product, in place; what was left alone, and why, a line each.

    Pivots are left alone, for their left holds an identity; so are matrices of rank 0. Raises ValueError where nothing
    is decomposed.
    """
    notes = []
    for name, module in decomposed(model).items():
        if module.spec()["rank"] == 0:
            notes.append(f"{name}: rank 0, there is nothing to balance")
        elif module.spec()["format"] in PIVOTS:
            notes.append(f"{name}: a pivot keeps rows or columns as they are and is not balanced")
        else:
            _write(module, *_spectrum(module))
    return notes


@torch.no_grad()
def refined(
    model: PreTrainedModel,
    exponent: float = 0.5,
    blend: float = 1.0,
    preserve: str = "fro",
    dense: bool = False,
    biases: bool = False,
) -> list[str]:
    """Flatten the spectrum of every low-rank part, in place; what was left alone, and why, a line each.

    σ becomes c σ^(1 − blend (1 − exponent)), c such that the norm to `preserve` stays. dense: dense layers of the
    blocks too. biases: those of the same layers too, as matrices of one column with the singular value ‖b‖ + 1e-8 and
    c = 1. Pairs come out balanced, pivots as pivots, chosen anew. Raises ValueError where nothing is decomposed, and
    for an exponent not above 0, a blend outside [0, 1], an unknown norm.
    """
    if not 0 < exponent < math.inf:
        raise ValueError(f"exponent is {exponent}: it is above 0, ½ as published, 1 for no change")
    if not 0 <= blend <= 1:
        raise ValueError(f"blend is {blend}: it is from 0, no change, to 1, the whole of it")
    if preserve not in NORMS:
        raise ValueError(f"preserve is {preserve!r}: it is one of {', '.join(NORMS)}")
    power, notes, found = 1 - blend * (1 - exponent), [], decomposed(model)
    layers = factored.dense_layers(model) if dense else {}
    if power == 1:
        return ["blend 0 or exponent 1: nothing changes"]
    for name, module in found.items():
        if module.spec()["rank"] == 0:
            notes.append(f"{name}: rank 0, there is no spectrum to refine")
            continue
        u, sigma, vh = _spectrum(module)
        _write(module, u, flattened(sigma, power, preserve), vh)
    for layer in layers.values():
        _refine_dense(layer.get_parameter("weight"), is_transposed(layer), power, preserve)
    for layer in (*found.values(), *layers.values()) if biases else ():
        if isinstance(layer.bias, Tensor):
            layer.bias.copy_(_scaled(layer.bias, power))
    return notes


def flattened(sigma: Float[Tensor, "r"], power: float, preserve: str) -> Float[Tensor, "r"]:
    """c σ^power for what is above the noise, c such that the norm stays; the rest as it is. σ falls."""
    used = sigma > NOISE * sigma.max()
    powered = sigma.pow(power)
    if preserve == "none" or not used.any():
        scale = 1.0
    elif preserve == "fro":
        scale = float(sigma[used].norm() / powered[used].norm())
    else:
        scale = float(sigma[0] / powered[0])
    return torch.where(used, scale * powered, sigma)


def _spectrum(module: Format) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r"], Float[Tensor, "r n"]]:
    """The SVD of a module's low-rank part, at its rank."""
    parts = parts_of(module)
    return factored_svd(parts["left"], parts["right"], module.spec()["rank"])


def _write(module: Format, u: Float[Tensor, "out r"], sigma: Float[Tensor, "r"], vh: Float[Tensor, "r n"]) -> None:
    """Give a module the low-rank part U diag(σ) Vᵀ; all else of it stays."""
    put(module, parts_of(module) | pair(module.spec()["format"], u, sigma, vh))


def _refine_dense(weight: Tensor, turned: bool, power: float, preserve: str) -> None:
    """The same of a dense weight, in place."""
    u, sigma, vh = torch.linalg.svd((weight.T if turned else weight).double(), full_matrices=False)
    new = (u * flattened(sigma, power, preserve)) @ vh
    weight.copy_(new.T if turned else new)


def _scaled(bias: Float[Tensor, "out"], power: float) -> Float[Tensor, "out"]:
    """b (‖b‖ + 1e-8)^(power − 1)."""
    wide = bias.double()
    return (wide * (wide.norm() + LEAST).pow(power - 1)).to(bias.dtype)
