"""The module formats: what stands in a model where a dense linear layer stood.

Each format is an `nn.Module` whose state-dict names are the names in a checkpoint. A spec is a JSON object that says
which format, and of which size; a layout is {module name: spec}. This file imports torch only: a copy of it is in
every checkpoint, which so loads without the package.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
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
        self.register_load_state_dict_post_hook(_derived)  # runs once the children have their tensors too

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
        shape other than the spec's; indices that are out of range, doubled or out of order.
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
            if not wanted[name].is_floating_point():
                given_as, tensor = tensor, tensor.to(wanted[name].dtype)
                if (given_as != tensor).any():
                    raise ValueError(f"tensor {name!r} holds numbers that {tensor.dtype} does not")
            # A view of a larger tensor would keep all of it alive, and could not be saved.
            given[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        module.load_state_dict(given, assign=True)
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


class Sparse(Format):
    """What formats with a sparse part share: y gains S x, S out × in with nnz entries, `values`, row after row.

    Their places are stored as the spec's `index` says. csr: `row_starts` int32 (out + 1), `columns` (nnz), rising in
    each row, int16 for up to 32768 inputs, else int32. mask: `mask` uint8, out × ceil(in / 8), input j bit j % 8, the
    lowest first, of byte j // 8; unused bits are 0. In memory also int32 `starts` and `inputs`: the CSR indices of S.
    """

    sizes: tuple[str, ...] = ("rank", "nnz")
    starts: Tensor
    inputs: Tensor

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        self.values = nn.Parameter(torch.empty(self._spec["nnz"], device=device, dtype=dtype))
        for name, (shape, kind) in _index_form(self._spec).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        for name, size in (("starts", self.out_features + 1), ("inputs", self._spec["nnz"])):
            self.register_buffer(name, torch.empty(size, dtype=torch.int32, device=device), persistent=False)

    def derive(self) -> None:
        super().derive()
        stored = {name: self.get_buffer(name) for name in _index_form(self._spec)}
        if not any(tensor.is_meta for tensor in stored.values()):
            read = _from_mask if self._spec["index"] == "mask" else _from_csr
            self.starts, self.inputs = read(**stored, size=self.in_features, nnz=self._spec["nnz"])

    def _weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        low: Tensor = super()._weight(dtype, device)
        return low + _full(self.values.to(dtype), self.starts, self.inputs, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        flat, values = x.reshape(-1, self.in_features), self.values.to(x.dtype)
        if flat.device.type != "cpu" and len(flat) > 16:
            y = nn.functional.linear(flat, _full(values, self.starts, self.inputs, self.in_features))
        else:
            # Compilers know no sparse tensors, and autograd is slow on them: there the product is one opaque operator.
            opaque = torch.compiler.is_compiling() or torch.is_grad_enabled()
            product = torch.ops.spectrim.sparse_product if opaque else _sparse_product
            y = product(flat, values, self.starts, self.inputs, self.out_features)
        y = y.view(*x.shape[:-1], self.out_features)
        return super().forward(x) + y if self._spec["rank"] else self._biased(y)


class LowRankSparse(Sparse, LowRank):
    """y = left(right(x)) + S x + bias."""

    format = "low_rank_sparse"


class Pivot(Format):
    """A rank-r weight from r of its own rows, or columns, and the mix that gives the others; format `pivot`.

    side rows: y[order] = [base x; mix base x] + bias; base r × in, mix (out − r) × r; order[:r] are the pivot rows.
    side columns: y = base z + bias, z = [x_C; x_P + mix x_R], order = [C, P, R] over the inputs: c = `kept` columns
    that are not mixed, r pivots, the rest; base out × (c + r), mix r × (in − c − r).
    """

    format = "pivot"
    sizes: tuple[str, ...] = ("rank",)
    order: Tensor

    def __init__(self, spec: Mapping[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, device, dtype)
        rank, kept = self._spec["rank"], self._spec.get("kept", 0)
        self.by_rows = self._spec.get("side", "rows") == "rows"
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


class PivotSparse(Sparse, Pivot):
    """y[order] = [base x; mix base x], plus S x and the bias: the pivot form, side rows, beside a sparse part."""

    format = "pivot_sparse"


_KINDS = (ResizedLinear, LowRank, Pivot, LowRankColumns, LowRankSparse, PivotSparse)
FORMATS: dict[str, type[Format]] = {kind.format: kind for kind in _KINDS}


def checked(spec: Any) -> dict[str, Any]:
    """Return the spec in canonical form. ValueError: a format or key unknown, a key missing, a size out of range."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"a spec is an object with a format and sizes, not {spec!r:.200}")
    format = spec.get("format")
    kind = FORMATS.get(format) if isinstance(format, str) else None
    if kind is None:
        raise ValueError(f"unknown module format {format!r:.200}; known: {sorted(FORMATS)}")
    keys = ("format", "in", "out", "bias", *kind.sizes)
    if kind is Pivot:
        spec = {key: value for key, value in spec.items() if key != "kept" or type(value) is not int or value}
        keys += ("side", "kept") if "kept" in spec else ("side",)
    keys += ("index",) if "nnz" in keys else ()
    if set(keys) != set(spec):
        odd = f"missing {sorted(set(keys) - set(spec))}, unknown {sorted(set(spec) - set(keys), key=str)}"
        raise ValueError(f"a spec of format {kind.format!r} does not have the right keys: {odd}")
    for key in keys:
        value = spec[key]
        right = {"format": True, "bias": isinstance(value, bool), "index": value in ("csr", "mask")}
        right["side"] = value in ("rows", "columns")
        if not right.get(key, type(value) is int and value >= 0):
            raise ValueError(f"{key!r} of a spec of format {kind.format!r} cannot be {value!r:.200}")
    size, rank, kept = (spec["in"], spec["out"]), spec.get("rank", 0), spec.get("kept", 0)
    room = min(size[0] - kept, size[1])
    bad_kept = kept > size[0] or (kept and spec.get("side") == "rows")
    # no tensor has 2⁵⁶ entries: counts of bytes stay within 64 bits
    if not 0 < size[0] * size[1] < 2**56 or bad_kept or rank > room or spec.get("nnz", 0) > size[0] * size[1]:
        raise ValueError(f"the sizes do not fit together: {dict(spec)!r:.400}")
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
    that is no linear layer or is compressed otherwise or named twice, a spec that does not fit the layer's shape.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    named: dict[int, str] = {}
    for name in layout:
        # Names that lead to a module by way of an attribute (base_model.…) would replace it under a second name.
        if name not in known or name == "":
            raise ValueError(f"the layout names the module {name!r:.200}: the model has none of this name")
        above = next((above for above in _parents(name) if above in layout), None)
        if above is not None or named.setdefault(id(known[name]), name) != name:
            other = above or named[id(known[name])]
            raise ValueError(f"the layout names the module {name!r} and {other!r}, which share it")
    for name, module in [(name, _replacement(model, name, spec, dtype)) for name, spec in layout.items()]:
        if module is not None:
            model.set_submodule(name, module)


def _replacement(model: nn.Module, name: str, spec: Any, dtype: torch.dtype | None) -> Format | None:
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


def _parents(name: str) -> Iterator[str]:
    """Yield the names of the modules that a module is in, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _linear(size: int, out: int, device: Any, dtype: torch.dtype | None) -> nn.Linear | None:
    if not size or not out:
        return None
    return nn.utils.skip_init(_Factor, size, out, bias=False, device=device or torch.get_default_device(), dtype=dtype)


def _derived(module: nn.Module, keys: Any) -> None:
    module.derive()  # type: ignore[operator]


class _Factor(nn.Linear):
    """A linear layer whose state dict holds its weight row by row, as files do, however it lies in memory."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()


def _distinct(name: str, index: Tensor, below: int) -> None:
    """Raise ValueError unless the indices are in [0, below) and none comes twice."""
    index = index.long()
    if not bool(((index >= 0) & (index < below)).all()) or index.unique().numel() != index.numel():
        raise ValueError(f"the indices in {name!r} must be distinct and within [0, {below})")


def smaller_index(out_features: int, in_features: int, nnz: int) -> str:
    """Return which index takes fewer bytes for `nnz` entries of out × in, `csr` or `mask`; csr if they tie."""
    spec = {"out": out_features, "in": in_features, "nnz": nnz}
    return min(("csr", "mask"), key=lambda index: index_bytes({**spec, "index": index}))


def index_bytes(spec: Mapping[str, Any]) -> int:
    """Return the bytes of a sparse part's stored index: csr 4 (out + 1) + 2 nnz (or 4 nnz), mask out · ceil(in / 8)."""
    return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in _index_form(spec).values())


def stored_index(spec: Mapping[str, Any], entries: Tensor) -> dict[str, Tensor]:
    """Return the stored index of a sparse part, by state-dict name, for entries (int64, nnz) at row · in + column.

    ValueError: entries that do not rise, are out of range or not nnz many; a spec without a sparse part.
    """
    spec = checked(spec)
    if "nnz" not in spec:
        raise ValueError(f"the format {spec['format']!r} has no sparse part")
    size, room, form = spec["in"], spec["in"] * spec["out"], _index_form(spec)
    ends = [*entries[:1].tolist(), *entries[-1:].tolist()]
    if entries.shape != (spec["nnz"],) or (entries.diff() <= 0).any() or any(not 0 <= end < room for end in ends):
        given = f"given are {tuple(entries.shape)}, first and last {ends}"
        raise ValueError(f"entries must be {spec['nnz']} rising numbers within [0, {room}); {given}")
    rows, columns = entries // size, entries % size
    if spec["index"] == "csr":
        starts = nn.functional.pad(rows.bincount(minlength=spec["out"]).cumsum(0), (1, 0))
        return {"row_starts": starts.to(torch.int32), "columns": columns.to(form["columns"][1])}
    (shape, kind), bits = form["mask"], (1 << columns % 8).to(torch.uint8)
    mask = torch.zeros(torch.Size(shape).numel(), dtype=kind, device=entries.device)
    return {"mask": mask.index_add_(0, rows * shape[1] + columns // 8, bits).view(shape)}


def _index_form(spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of a stored index, by state-dict name."""
    if spec["index"] == "mask":
        return {"mask": ((spec["out"], -(-spec["in"] // 8)), torch.uint8)}
    narrow = torch.int16 if spec["in"] <= 2**15 else torch.int32
    return {"row_starts": ((spec["out"] + 1,), torch.int32), "columns": ((spec["nnz"],), narrow)}


def _from_csr(row_starts: Tensor, columns: Tensor, size: int, nnz: int) -> tuple[Tensor, Tensor]:
    """Return `starts` and `inputs`. ValueError for indices out of range or out of order."""
    # as int64: in int32 a rise by more than 2³¹ and the fall after it would both look like rises
    if row_starts[0] != 0 or row_starts[-1] != nnz or (row_starts.long().diff() < 0).any():
        raise ValueError(f"row_starts must rise from 0 to nnz = {nnz}")
    inputs = columns.to(torch.int32)
    if ((inputs < 0) | (inputs >= size)).any() or (_places(row_starts, inputs, size).diff() <= 0).any():
        raise ValueError(f"the indices in 'columns' must rise in each row and be within [0, {size})")
    return row_starts, inputs


def _from_mask(mask: Tensor, size: int, nnz: int) -> tuple[Tensor, Tensor]:
    """Return `starts` and `inputs`. ValueError for bits set beyond the inputs, or another number of them than nnz."""
    bit, counts, inputs = torch.arange(8, dtype=torch.uint8, device=mask.device), [], []
    for rows in mask.split(256):  # unpacked, a mask takes eight times its bytes, and its bits' places 128 times
        bits = (rows.unsqueeze(-1) >> bit & 1).flatten(1)
        if bits[:, size:].any():
            raise ValueError(f"the mask has bits set beyond its {size} inputs")
        counts.append(bits.sum(1))
        inputs.append(bits.nonzero()[:, 1].to(torch.int32))
    starts = nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    if starts[-1] != nnz:
        raise ValueError(f"the mask has {int(starts[-1])} bits set, its spec says nnz = {nnz}")
    return starts.to(torch.int32), torch.cat(inputs)


def _places(starts: Tensor, columns: Tensor, size: int) -> Tensor:
    """Return row · size + column of each entry, int64; rows count from that of the first start."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff(), output_size=len(columns)).mul_(size).add_(columns)


def _full(values: Tensor, starts: Tensor, columns: Tensor, size: int) -> Tensor:
    """Return S, or the rows of it that the starts are of, with `size` columns; differentiable."""
    flat = values.new_zeros((len(starts) - 1) * size)
    return flat.scatter(0, _places(starts, columns, size), values).view(-1, size)


def _sparse_product(x: Tensor, values: Tensor, row_starts: Tensor, columns: Tensor, rows: int) -> Tensor:
    """Return x Sᵀ, tokens × rows, for S in CSR form; sums are in float32 or better. docs/formats.md says how fast."""
    (tokens, size), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    share, y = values.numel() / (rows * size), x.new_zeros(tokens, rows)
    if not tokens * share:
        return y
    with torch.autocast(x.device.type, enabled=False):
        if tokens <= 8 or x.device.type != "cpu":  # in float32: CPUs have no bfloat16 CSR product
            csr = torch.sparse_csr_tensor(row_starts, columns, values.to(wide), (rows, size), check_invariants=False)
            return y.copy_(csr @ x[0].to(wide) if tokens == 1 else (csr @ x.to(wide).t()).t())
        if tokens * share > 128 and share > (0.25 if x.element_size() == 2 else 0.5):
            for first in range(0, rows, step := max(1, 2**19 // size)):  # S made full, some rows at a time
                starts = row_starts[first : first + step + 1]
                part = slice(int(starts[0]), int(starts[-1]))
                y[:, first : first + step] = nn.functional.linear(x, _full(values[part], starts, columns[part], size))
            return y
        # Each output is a weighted sum of inputs, what embedding_bag is made for. 256 bytes of each input go at a time:
        # they stay in the cache. bfloat16 and float16 are faster only from 32 tokens on.
        step, kind = 256 // x.element_size(), wide if tokens < 32 else x.dtype
        for some, to in zip(x.split(step), y.split(step), strict=True):
            bag = some.t().to(kind).contiguous(), columns, row_starts, False, 0  # mode 0: sums
            to.copy_(torch.embedding_bag(*bag, False, values.to(kind), include_last_offset=True)[0].t())
    return y


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    """Return those of x and values, by dense products: many times as fast as the products' own under autograd."""
    x, values, starts, columns = ctx.saved_tensors
    (for_x, for_values, *_), index = ctx.needs_input_grad, (starts, columns, x.shape[1])
    to_x = grad @ _full(values, *index) if for_x else None
    return to_x, (grad.t() @ x).flatten()[_places(*index)] if for_values else None, None, None, None


# A copy of this file may be loaded beside the package in one process: the operator is defined once.
if not hasattr(torch.ops.spectrim, "sparse_product"):
    _operator = torch.library.custom_op("spectrim::sparse_product", _sparse_product, mutates_args=())
    _operator.register_fake(lambda x, values, row_starts, columns, rows: x.new_empty(x.shape[0], rows))
    _keep = lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:4])  # noqa: E731
    _operator.register_autograd(_gradients, setup_context=_keep)

with warnings.catch_warnings():  # torch says once in a process that CSR tensors are young: let it be here
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), dtype=torch.float32, check_invariants=False)
