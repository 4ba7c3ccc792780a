"""The module formats: what stands in a model where a dense linear layer stood.

Each format is an `nn.Module` whose state-dict names are the names in a checkpoint. A spec is a JSON object that says
which format, and of which size; a layout is {module name: spec}. This file imports torch only: a copy of it is in
every checkpoint, which so loads without the package.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Format(nn.Module):
    """What all formats share. `bias` is a Parameter or None, as in the dense layer; `left`, `right`, `base`, `mix` and
    `kept` are `nn.Linear` without bias, as adapter libraries want them, or None if they had no entries (rank 0).
    """

    format = ""
    sizes: tuple[str, ...] = ()  # integers a spec holds beside in and out
    columns: Tensor
    _weight: Callable[[torch.dtype, torch.device], Tensor]  # out × in, computed in this dtype
    gather: Tensor  # int64, not stored: follows from the stored indices

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self._spec = checked(spec)
        self.in_features, self.out_features = self._spec["in"], self._spec["out"]
        new = torch.empty(self.out_features, device=device, dtype=dtype) if self._spec["bias"] else None
        self.bias = None if new is None else nn.Parameter(new)

    def spec(self) -> dict[str, Any]:
        """Return the spec (JSON) from which `empty` makes a module of this shape."""
        return dict(self._spec)

    @classmethod
    def empty(cls, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> "Format":
        """Return a module of the spec's shape, its tensors not yet set. ValueError for a spec that does not fit."""
        if spec.get("format") != cls.format:
            raise ValueError(f"a spec of format {spec.get('format')!r} was given to {cls.__name__} ({cls.format!r})")
        return cls(spec, device, dtype)

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None) -> "Format":
        """Return a module that holds copies of `tensors`, keyed by their state-dict names, and of `bias`.

        Tensors without entries may be given or left out. ValueError: a tensor that is missing, not wanted, or of a
        shape other than the spec's; indices that are out of range or doubled.
        """
        module = cls.empty(spec, device="meta")
        wanted = module.state_dict()
        given = {name: tensor for name, tensor in tensors.items() if name in wanted or tensor.numel()}
        given |= {} if bias is None else {"bias": bias}
        if given.keys() != wanted.keys():
            odd = f"missing {sorted(wanted.keys() - given.keys())}, not wanted {sorted(given.keys() - wanted.keys())}"
            raise ValueError(f"tensors do not fit the spec {module.spec()}: {odd}")
        for name, tensor in given.items():
            if tensor.shape != wanted[name].shape:
                shapes = f"{tuple(tensor.shape)}, the spec {module.spec()} needs {tuple(wanted[name].shape)}"
                raise ValueError(f"tensor {name!r} has the shape {shapes}")
            tensor = tensor if wanted[name].is_floating_point() else tensor.to(torch.int32)
            # A view of a larger tensor would keep all of it alive, and could not be saved.
            given[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        module.load_state_dict(given, assign=True)
        module.derive()  # load_state_dict derives before the children have their tensors
        return module

    def derive(self) -> None:
        """Check the stored indices and set what follows from the stored tensors. ValueError for bad indices.

        Tall float32 weights on a CPU are laid out column by column in memory: at one token their product is 1.2 to 2.0
        times as fast (rows of 300 to 2048 numbers, one thread), at 256 tokens the same; bfloat16 would lose a tenth.
        """
        for weight in (child.weight for child in self.children() if isinstance(child, nn.Linear)):
            tall = weight.shape[0] > weight.shape[1] and weight.is_contiguous()
            if tall and weight.dtype == torch.float32 and weight.device.type == "cpu":
                weight.data = weight.data.t().contiguous().t()

    def dense(self) -> Tensor:
        """Return the weight out × in that this module stands for, without the bias.

        In the dtype of the parameters, computed in float32 or better; differentiable.
        """
        first = next(self.parameters(), torch.empty(0))
        return self._weight(torch.promote_types(first.dtype, torch.float32), first.device).to(first.dtype)

    def _gathered(self, x: Tensor) -> Tensor:
        # One CPU thread, 512 × 2048: 0.6 ms forward, 6 with backward; index_select takes 6 and 26 (0.8 and 20 in 2-D).
        return x.gather(-1, self.gather.expand(*x.shape[:-1], -1))

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.derive()


class ResizedLinear(Format, nn.Linear):  # type: ignore[misc]
    """y = W x + bias with fewer rows or columns than the layer it replaces; format `dense`."""

    format = "dense"

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))

    def _weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class LowRank(Format):
    """y = left(right(x)) + bias: left.weight out × r, right.weight r × in."""

    format = "low_rank"
    sizes: tuple[str, ...] = ("rank",)

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        rank, self._factored = self._spec["rank"], self.in_features - self._spec.get("kept", 0)
        self.left = _linear(rank, self.out_features, device, dtype)
        self.right = _linear(self._factored, rank, device, dtype)

    def _pair(self, x: Tensor) -> Tensor:
        if self.left is None or self.right is None:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self.left(self.right(x))

    def _weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.left is None or self.right is None:
            return torch.zeros(self.out_features, self._factored, dtype=dtype, device=device)
        return self.left.weight.to(dtype) @ self.right.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._biased(self._pair(x))


class LowRankColumns(LowRank):
    """y = left(right(x_R)) + kept(x_C) + bias: c columns of W kept as they are, a pair for the others.

    `columns` (int32, c, any order) are the kept input indices C; R are the others, ascending. kept.weight is out × c,
    right.weight r × (in − c). One gather serves both products.
    """

    format = "low_rank_columns"
    sizes = ("rank", "kept")

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        kept = self._spec["kept"]
        self.kept = _linear(kept, self.out_features, device, dtype)
        self.register_buffer("columns", torch.empty(kept, dtype=torch.int32, device=device))
        used = self.in_features if self._spec["rank"] else kept
        self.register_buffer("gather", torch.empty(used, dtype=torch.int64, device=device), persistent=False)

    def derive(self) -> None:
        super().derive()
        if not self.columns.is_meta:
            _distinct("columns", self.columns, self.in_features)
            self.gather = self._order()[: self.gather.numel()].long()

    def _order(self) -> Tensor:
        free = torch.ones(self.in_features, dtype=torch.bool, device=self.columns.device)
        free[self.columns.long()] = False
        return torch.cat([self.columns, free.nonzero().flatten().int()])

    def _weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        parts = [] if self.kept is None else [self.kept.weight.to(dtype)]
        return torch.cat([*parts, super()._weight(dtype, device)], dim=1).index_select(1, self._order().argsort())

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            return self._biased(self._pair(x))
        x = self._gathered(x)
        if self.left is None:
            return self._biased(self.kept(x))
        kept = self._spec["kept"]
        return self._biased(self.kept(x[..., :kept]) + self._pair(x[..., kept:]))


class LowRankSparse(LowRank):
    """y = left(right(x)) + S x + bias, S out × in with nnz entries: `values` and, in CSR order, int32 indices.

    `row_starts` (out + 1) and `columns` (nnz) are the CSR indices of S. Measured, one CPU thread, 2048 × 2048, ms at
    1 / 256 tokens: at 3 % CSR 0.08 / 6.8, S made full 2.3 / 31; 10 % 0.13 / 13, 1.7 / 28; 30 % 0.37 / 40, 3.1 / 27
    (bfloat16 0.07 / 4.2, 1.3 / 12; 0.18 / 13, 3.2 / 13; 0.50 / 46, 3.7 / 15); index_add 17 at 5 % and 1 token. CSR runs
    in float32 or better: CPUs have no bfloat16 one. So S is made full, while it is used, for more than 16 tokens where
    over one entry in eight is kept, or off the CPU (not measured there).
    """

    format = "low_rank_sparse"
    sizes = ("rank", "nnz")
    row_starts: Tensor

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        self.values = nn.Parameter(torch.empty(self._spec["nnz"], device=device, dtype=dtype))
        self.register_buffer("row_starts", torch.empty(self.out_features + 1, dtype=torch.int32, device=device))
        self.register_buffer("columns", torch.empty(self._spec["nnz"], dtype=torch.int32, device=device))

    def derive(self) -> None:
        super().derive()
        if not self.columns.is_meta and not self.row_starts.is_meta:
            counts, nnz = self.row_starts.diff(), self._spec["nnz"]
            if self.row_starts[0] != 0 or self.row_starts[-1] != nnz or (counts < 0).any():
                raise ValueError(f"row_starts must rise from 0 to nnz = {nnz}")
            rows = torch.arange(self.out_features, device=counts.device).repeat_interleave(counts)
            _distinct("columns", self.columns, self.in_features, rows)

    def _weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return super()._weight(dtype, device) + self._rest(self.values.to(dtype))

    def _rest(self, values: Tensor) -> Tensor:
        rows = torch.arange(self.out_features, device=values.device)
        rows = rows.repeat_interleave(self.row_starts.diff(), output_size=values.numel())
        flat = values.new_zeros(self.out_features * self.in_features)
        return flat.index_put((rows * self.in_features + self.columns,), values).view(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        values = self.values.to(x.dtype)
        small = x.device.type == "cpu" and 8 * values.numel() <= self.in_features * self.out_features
        if (flat.shape[0] <= 16 or small) and not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            # Compilers know no sparse tensors: in a compiled graph the product is one opaque operator.
            product = torch.ops.spectrim.sparse_product if torch.compiler.is_compiling() else _sparse_product
            y = product(flat, values, self.row_starts, self.columns, self.out_features)
        else:
            y = nn.functional.linear(flat, self._rest(values))
        y = y.view(*x.shape[:-1], self.out_features)
        return self._biased(y if self.left is None else self._pair(x) + y)


class Pivot(Format):
    """A rank-r weight from r of its own rows, or columns, and the mix that gives the others; format `pivot`.

    side rows: y[order] = [base x; mix base x] + bias; base r × in, mix (out − r) × r; order[:r] are the pivot rows.
    side columns: y = base z + bias, z = [x_C; x_P + mix x_R], order = [C, P, R] over the inputs: c = `kept` columns
    that are not mixed, r pivots, the rest; base out × (c + r), mix r × (in − c − r).
    """

    format = "pivot"
    sizes = ("rank",)
    order: Tensor

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        rank, kept = self._spec["rank"], self._spec.get("kept", 0)
        self.by_rows = self._spec["side"] == "rows"
        size = self.out_features if self.by_rows else self.in_features
        rest = size - kept - rank
        base, mix = (kept + rank, self.out_features), (rest, rank)
        if self.by_rows:
            base, mix = (self.in_features, rank), (rank, rest)
        self.base, self.mix = _linear(*base, device, dtype), _linear(*mix, device, dtype)
        used = size if self.by_rows or rank else kept
        if self.base is not None:
            self.register_buffer("order", torch.empty(size, dtype=torch.int32, device=device))
            self.register_buffer("gather", torch.empty(used, dtype=torch.int64, device=device), persistent=False)

    def derive(self) -> None:
        super().derive()
        if self.base is not None and not self.order.is_meta:
            _distinct("order", self.order, self.order.numel())
            self.gather = self.order.argsort() if self.by_rows else self.order[: self.gather.numel()].long()

    def _weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.base is None:
            return torch.zeros(self.out_features, self.in_features, dtype=dtype, device=device)
        base, mix = self.base.weight.to(dtype), None if self.mix is None else self.mix.weight.to(dtype)
        if self.by_rows:
            stored = base if mix is None else torch.cat([base, mix @ base])
            return stored.index_select(0, self.gather)
        rest = base.new_zeros(self.out_features, self.in_features - base.shape[1])
        rest = rest if mix is None else base[:, -self._spec["rank"] :] @ mix
        return torch.cat([base, rest], dim=1).index_select(1, self.order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        if self.base is None:
            return self._biased(x.new_zeros(*x.shape[:-1], self.out_features))
        if self.by_rows:
            y = self.base(x)
            return self._biased(self._gathered(torch.cat([y, self.mix(y)], dim=-1) if self.mix else y))
        x = self._gathered(x)
        if self.mix is None:
            return self._biased(self.base(x))
        rank, kept = self._spec["rank"], self._spec.get("kept", 0)
        z = x[..., kept : kept + rank] + self.mix(x[..., kept + rank :])
        return self._biased(self.base(torch.cat([x[..., :kept], z], dim=-1) if kept else z))


_KINDS = (ResizedLinear, LowRank, Pivot, LowRankColumns, LowRankSparse)
FORMATS: dict[str, type[Format]] = {kind.format: kind for kind in _KINDS}


def checked(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec in canonical form. ValueError: a format or key unknown, a key missing, a size out of range."""
    kind = FORMATS.get(spec.get("format", ""))
    if kind is None:
        raise ValueError(f"unknown module format {spec.get('format')!r}; known: {sorted(FORMATS)}")
    keys = ("format", "in", "out", "bias", *kind.sizes)
    if kind is Pivot:
        spec = {key: value for key, value in spec.items() if key != "kept" or value != 0}
        keys += ("side", "kept") if "kept" in spec else ("side",)
    if set(keys) != set(spec):
        odd = f"missing {sorted(set(keys) - set(spec))}, unknown {sorted(set(spec) - set(keys))}"
        raise ValueError(f"a spec of format {kind.format!r} does not have the right keys: {odd}")
    for key in keys:
        value = spec[key]
        right = {"format": True, "bias": isinstance(value, bool), "side": value in ("rows", "columns")}
        if not right.get(key, type(value) is int and value >= 0):
            raise ValueError(f"{key!r} of a spec of format {kind.format!r} cannot be {value!r}")
    size, rank, kept = (spec["in"], spec["out"]), spec.get("rank", 0), spec.get("kept", 0)
    room = min(size[0] - kept, size[1]) if kind is Pivot else rank * (kept < size[0])
    bad_kept = kept > size[0] or (kept and spec.get("side") == "rows")
    if min(size) == 0 or bad_kept or rank > room or spec.get("nnz", 0) > size[0] * size[1]:
        raise ValueError(f"the sizes do not fit together: {dict(spec)}")
    return {key: spec[key] for key in keys}


def empty(spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> Format:
    """Return the module a spec describes, its tensors not yet set. ValueError as for `checked`."""
    return FORMATS[checked(spec)["format"]].empty(spec, device, dtype)


def build(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None) -> Format:
    """Return the module a spec describes, holding copies of the tensors. ValueError as for `Format.build`."""
    return FORMATS[checked(spec)["format"]].build(spec, tensors, bias)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, a linear layer that stores its weight in × out."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def spec_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the spec of a compressed module, None for any other one."""
    # Not isinstance: the class may come from the copy of this file beside a checkpoint.
    return module.spec() if hasattr(module, "spec") and hasattr(module, "derive") else None  # type: ignore[operator]


def swap(model: nn.Module, layout: Mapping[str, Mapping[str, Any]], dtype: torch.dtype | None = None) -> None:
    """Put an empty module in the place of each one the layout names, on the device and in the dtype of its weight.

    A module that already has its spec stays. ValueError, before anything is changed: a name the model lacks, a module
    that is no linear layer or is compressed otherwise, a spec that does not fit the layer's shape.
    """
    for name, module in [(name, _replacement(model, name, spec, dtype)) for name, spec in layout.items()]:
        if module is not None:
            model.set_submodule(name, module)


def _replacement(model: nn.Module, name: str, spec: Mapping[str, Any], dtype: torch.dtype | None) -> Format | None:
    try:
        old = model.get_submodule(name)
        wanted = checked(spec)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"the layout names the module {name!r}: {error}") from error
    present = spec_of(old)
    if present not in (None, wanted):
        raise ValueError(f"module {name!r} already has the spec {present}, the layout says {wanted}")
    if present is not None:
        return None
    if not isinstance(old, nn.Linear) and not is_transposed(old):
        raise ValueError(f"module {name!r} is a {type(old).__name__}, not a linear layer that could be replaced")
    weight = old.get_parameter("weight")
    shape = tuple(reversed(weight.shape)) if is_transposed(old) else tuple(weight.shape)
    given = wanted["out"], wanted["in"]
    if given != shape and (wanted["format"] != "dense" or given[0] > shape[0] or given[1] > shape[1]):
        raise ValueError(f"module {name!r} is {shape} (out × in), the layout's {wanted['format']} is {given}")
    return empty(wanted, weight.device, dtype or weight.dtype).train(old.training)


def _linear(size: int, out: int, device: Any, dtype: torch.dtype | None) -> nn.Linear | None:
    if not size or not out:
        return None
    return nn.utils.skip_init(
        nn.Linear, size, out, bias=False, device=device or torch.get_default_device(), dtype=dtype
    )


def _distinct(name: str, index: Tensor, below: int, rows: Tensor | None = None) -> None:
    """Raise ValueError unless the indices are in [0, below) and none comes twice (within a row, if rows are given)."""
    index = index.long()
    inside = bool(((index >= 0) & (index < below)).all())
    keys = index if rows is None else index + below * rows
    if not inside or keys.unique().numel() != keys.numel():
        raise ValueError(f"the indices in {name!r} must be distinct and within [0, {below})")


def _sparse_product(x: Tensor, values: Tensor, row_starts: Tensor, columns: Tensor, rows: int) -> Tensor:
    """Return x Sᵀ, tokens × rows, for S in CSR form; computed in float32 or better, differentiable."""
    wide = torch.promote_types(values.dtype, torch.float32)
    matrix = torch.sparse_csr_tensor(row_starts, columns, values.to(wide), (rows, x.shape[-1]), check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[0] == 1:
            return (matrix @ x[0].to(wide)).unsqueeze(0).to(x.dtype)
        return (matrix @ x.to(wide).t()).t().contiguous().to(x.dtype)


# A copy of this file may be loaded beside the package in one process: the operator is defined once.
if not hasattr(torch.ops.spectrim, "sparse_product"):
    _operator = torch.library.custom_op("spectrim::sparse_product", _sparse_product, mutates_args=())
    _operator.register_fake(lambda x, values, row_starts, columns, rows: x.new_empty(x.shape[0], rows))

with warnings.catch_warnings():  # torch says once in a process that CSR tensors are young: let it be here
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float32, check_invariants=False)
