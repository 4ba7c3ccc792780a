"""The factors of a compressed module as a cut, and back: the inverse of `model.apply.form`, for every format.

A cut is what a method hands over: `left` out × r and `right` r × n (n the inputs beside the kept columns, ascending),
`kept` out × c with `columns` (their inputs), `entries` (row · in + column, rising) with their `values`, or the
`weight` of a narrowed layer. The pivot form is such a pair: by rows left = [I; mix] in the order of the outputs and
right = base; by columns left is the base beyond its kept columns, and right = [I, mix] in the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spectrim.core.plan import balance
from spectrim.finetune.factored import compressed
from spectrim.model.apply import form
from spectrim.model.modules import Format

PIVOTS = ("pivot", "pivot_sparse")


def decomposed(model: nn.Module) -> dict[str, Format]:
    """The compressed modules that are more than narrowed layers, by name. Raises ValueError where there is none."""
    found = {name: module for name, module in compressed(model).items() if module.spec()["format"] != "dense"}
    if not found:
        raise ValueError(
            "no matrix of the model is decomposed, so there are no factors to tune; run `spectrim compress` first, "
            "with a method that decomposes matrices"
        )
    return found


def with_rank(model: nn.Module) -> dict[str, Format]:
    """The compressed modules whose low-rank part is not empty, by name. Raises ValueError where there is none."""
    found = {name: module for name, module in decomposed(model).items() if module.spec()["rank"]}
    if not found:
        raise ValueError(
            "every decomposed matrix of the model has rank 0, so there are no factors to tune; run `spectrim compress` "
            "first, with a method or a ratio that leaves some rank"
        )
    return found


def width(module: Format) -> int:
    """How many inputs the low-rank part of a module reads: those that are not kept columns."""
    return module.in_features - int(module.spec().get("kept", 0))


@torch.no_grad()
def parts_of(module: Format) -> dict[str, Tensor]:
    """The cut of a compressed module, copies in float32 or better; indices are int64. `left` and `right` may be empty.

    Keys: left, right; with kept columns kept, columns; with a sparse part entries, values; of a narrowed layer weight.
    The pair of a pivot holds its factor of identity and mix written out: r(out + n) numbers in all.
    """
    spec = module.spec()
    if spec["format"] == "dense":
        return {"weight": _wide(module.get_parameter("weight"))}
    if spec["format"] in PIVOTS:
        parts = _rows(module) if spec.get("side", "rows") == "rows" else _columns(module)
    else:
        parts = {side: _factor(module, side) for side in ("left", "right")}
    if spec["format"] == "low_rank_columns":
        parts |= {"kept": _factor(module, "kept"), "columns": module.columns.long().clone()}
    if "nnz" in spec:
        starts, inputs = module.get_buffer("starts").long(), module.get_buffer("inputs").long()
        rows = torch.arange(module.out_features, device=starts.device).repeat_interleave(starts.diff())
        parts |= {"entries": rows * module.in_features + inputs, "values": _wide(module.get_parameter("values"))}
    return parts


@torch.no_grad()
def put(module: Format, parts: Mapping[str, Tensor]) -> None:
    """Write a cut into a compressed module, in place: dtype, memory layout and parameters stay the objects they are.

    In the pivot form the pivots are chosen anew, and the factors rounded together, as `form` does; `left` by rows and
    `right` by columns should be of full rank. Raises ValueError for a cut that does not have the module's shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _empty(module).items()}
    given = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    if shapes != given:
        raise ValueError(f"the parts do not fit the module {module.spec()}: they are {given}, it needs {shapes}")
    target = module.state_dict(keep_vars=True)
    kind = next((tensor.dtype for tensor in target.values() if tensor.is_floating_point()), torch.float32)
    # what has no entries is formed too, but the module does not hold it
    formed = {name: tensor for name, tensor in form(module.spec(), parts, kind).items() if name in target}
    assert formed.keys() == target.keys() - {"bias"}
    for name, tensor in formed.items():
        target[name].copy_(tensor)
    module.derive()


def factored_svd(
    left: Float[Tensor, "out k"], right: Float[Tensor, "k n"], rank: int
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r"], Float[Tensor, "r n"]]:
    """The first `rank` of (U, σ, Vᵀ) of left · right, float64; those beyond min(out, k, n) are zero.

    By QR of both factors and an SVD of the core between them: no matrix of out × n is made, 2k²(out + n)
    multiplications and an SVD of at most k × k.
    """
    first, second = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
    u, sigma, vh = torch.linalg.svd(first.R @ second.R.T, full_matrices=False)
    u, sigma, vh = first.Q @ u[:, :rank], sigma[:rank], vh[:rank] @ second.Q.T
    short, pad = rank - len(sigma), nn.functional.pad
    return pad(u, (0, short)), pad(sigma, (0, short)), pad(vh, (0, 0, 0, short))


def pair(
    format: str, u: Float[Tensor, "out r"], sigma: Float[Tensor, "r"], vh: Float[Tensor, "r n"]
) -> dict[str, Float[Tensor, "_ _"]]:
    """`left` and `right` of U diag(σ) Vᵀ as a format wants them: U√σ and √σVᵀ; for a pivot U, of full rank, and σVᵀ."""
    if format in PIVOTS:
        return {"left": u, "right": sigma[:, None] * vh}
    left, right = balance(u * sigma, vh)
    return {"left": left, "right": right}


def _empty(module: Format) -> dict[str, Tensor]:
    """A cut of the right shapes, on no device."""
    spec = module.spec()
    rank, size = spec.get("rank", 0), (module.out_features, width(module))
    if spec["format"] == "dense":
        return {"weight": torch.empty(size, device="meta")}
    made = {"left": (size[0], rank), "right": (rank, size[1])}
    shapes: dict[str, tuple[int, ...]] = dict(made)
    if spec["format"] == "low_rank_columns" or spec.get("side") == "columns":
        shapes |= {"kept": (size[0], spec.get("kept", 0)), "columns": (spec.get("kept", 0),)}
    if "nnz" in spec:
        shapes |= {"entries": (spec["nnz"],), "values": (spec["nnz"],)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _rows(module: Format) -> dict[str, Tensor]:
    """The pair of a pivot by rows: [I; mix] in the order of the outputs, and the base."""
    base = _factor(module, "base")
    if not len(base):
        return {"left": base.new_zeros(module.out_features, 0), "right": base}
    mixed = torch.cat([torch.eye(len(base)).to(base), _factor(module, "mix")])
    return {"left": mixed[module.get_buffer("order").argsort()], "right": base}


def _columns(module: Format) -> dict[str, Tensor]:
    """The pair of a pivot by columns: the base beyond its kept columns, and [I, mix] in the order of the inputs."""
    kept, rank = int(module.spec().get("kept", 0)), module.spec()["rank"]
    base = _factor(module, "base")
    if not base.numel():
        order: Int[Tensor, "in"] = torch.arange(module.in_features, device=base.device)
    else:
        order = module.get_buffer("order").long()
    mixed = torch.cat([torch.eye(rank).to(base), _factor(module, "mix")], dim=1)
    left, right = base[:, kept:], mixed[:, order[kept:].argsort()]
    return {"left": left, "right": right, "kept": base[:, :kept], "columns": order[:kept]}


def _factor(module: Format, name: str) -> Float[Tensor, "_ _"]:
    """A factor as it is, or the empty matrix that stands for it."""
    linear = getattr(module, name)
    if linear is not None:
        return _wide(linear.weight)
    spec = module.spec()
    rank, kept, out = spec.get("rank", 0), spec.get("kept", 0), module.out_features
    by_rows = spec.get("side", "rows") == "rows"
    shapes = {
        "left": (out, rank),
        "right": (rank, width(module)),
        "kept": (out, kept),
        "base": (rank, module.in_features) if by_rows else (out, kept + rank),
        "mix": (out - rank, rank) if by_rows else (rank, width(module) - rank),
    }
    like = next(module.parameters(), torch.empty(0))
    return torch.zeros(shapes[name], dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float32 or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
