"""Writes a compressed model as a plain dense one, which loads anywhere, a tensor at a time."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from spectrim.model import modules
from spectrim.model.checkpoint import refuse_absurd, skeleton
from spectrim.model.files import config_json, read_config, stored_dtype, weight_files
from spectrim.model.loading import CODE_FILE, Layout, read_layout
from spectrim.model.native import changed, shape_of
from spectrim.model.quantizer import CODE_MODULE
from spectrim.model.writer import Item, new_directory, refuse_filled, write_shards

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|gguf|index\.json)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the compressed checkpoint; `name` is the model's for it, `key` the file's."""

    name: str
    key: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.key)
        return tensor


def export_dense(
    directory: str | Path, out: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write the compressed model in `directory` to `out` with a dense weight in the place of each compressed one.

    dtype: of all floating-point tensors (None: as stored). An FFN that lost channels gets its new width in config.json
    if all blocks have one width and a single key says it; else channels of zeros, which change nothing, fill the gap.
    Memory: the tensors of one module. `out` appears when it is complete.

    ValueError: `out` is not empty; `directory` holds no compressed model; a tensor is missing; the architecture has no
    place for a bias or a shape that the compressed model has.
    """
    directory, out = Path(directory), Path(out)
    refuse_filled(out, overwrite=False)
    layout = read_layout(directory)
    config = read_config(directory)
    del config.quantization_config
    refuse_absurd(directory, config, weight_files(directory), layout=layout)
    changes, model = _dense_model(config, layout)
    default = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    fold = _Fold(model, layout, dtype, default, _stored(directory, layout, config))
    data = {**_plain_config(config_json(directory)), **changes}
    if dtype is not None:
        data.pop("torch_dtype", None)
        data["dtype"] = str(dtype).removeprefix("torch.")
    with new_directory(out, overwrite=False) as temporary:
        write_shards(temporary, list(fold.items()), max_shard_bytes, lambda done, total: None)
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        for file in directory.iterdir():
            if file.is_file() and file.name not in ("config.json", CODE_FILE) and not WEIGHTS.fullmatch(file.name):
                shutil.copyfile(file, temporary / file.name)


def _plain_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without what a compressed model has in it."""
    plain = {key: value for key, value in data.items() if key not in ("quantization_config", "auto_map")}
    auto_map = {key: value for key, value in (data.get("auto_map") or {}).items() if CODE_MODULE not in str(value)}
    return {**plain, "auto_map": auto_map} if auto_map else plain


def _stored(directory: Path, layout: Layout, config: PretrainedConfig) -> list[_Stored]:
    """Return the checkpoint's tensors under the model's names, without the guard."""
    model = skeleton(config, torch.float32)
    modules.swap(model, layout)
    state, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = []
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                name = key if name not in state and key in state else name
                piece = opened.get_slice(key)
                shape = tuple(piece.get_shape())
                if shape != (0,) or name in state:
                    kind = stored_dtype(file, key, piece.get_dtype())
                    found.append(_Stored(name, key, file, kind, shape))
    return found


@dataclass(frozen=True)
class _Fold:
    """What is to be written: `model` is the dense skeleton, `default` the dtype where no tensor tells one."""

    model: PreTrainedModel
    layout: Layout
    dtype: torch.dtype | None
    default: torch.dtype
    stored: list[_Stored]

    def items(self) -> Iterator[Item]:
        """Yield each tensor as it is, each module folded, and zeros for each bias only the new config has."""
        own: dict[str, list[_Stored]] = {name: [] for name in self.layout}
        for tensor in self.stored:
            owner = next((name for name in _parents(tensor.name) if name in own), None)
            if owner is None:
                yield self._copy(tensor)
            else:
                own[owner].append(tensor)
        for name, tensors in own.items():
            yield self._folded(name, tensors)
        known = {tensor.name for tensor in self.stored} | {f"{name}.bias" for name in self.layout}
        for name, parameter in self.model.named_parameters():
            if name.endswith(".bias") and name not in known:
                yield _zeros(name, parameter.shape, self.dtype or self.default)

    def _copy(self, tensor: _Stored) -> Item:
        kind = self.dtype if self.dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        return Item({tensor.key: (kind, tensor.shape)}, lambda: {tensor.key: tensor.read().to(kind)})

    def _folded(self, name: str, stored: list[_Stored]) -> Item:
        dense = self.model.get_submodule(name)
        kind = self.dtype or next((t.dtype for t in stored if t.dtype.is_floating_point), self.default)
        # The file's name for the module may lack the base model's prefix; without tensors the model's own will do.
        keys = {tensor.key.removesuffix(tensor.name.removeprefix(name)) for tensor in stored} or {name}
        if len(keys) != 1:
            raise ValueError(f"module {name!r}: its tensors are stored under several names: {sorted(keys)}")
        key = keys.pop()
        parameters = dict(dense.named_parameters(recurse=False))
        shapes = {f"{key}.{leaf}": (kind, tuple(parameter.shape)) for leaf, parameter in parameters.items()}

        def make() -> dict[str, Tensor]:
            weight, bias = self._dense(name, stored)
            made = {f"{key}.weight": weight.t() if modules.is_transposed(dense) else weight, f"{key}.bias": bias}
            return {full: made[full].to(kind) for full in shapes}

        return Item(shapes, make)

    @torch.no_grad()
    def _dense(self, name: str, stored: list[_Stored]) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
        spec = self.layout[name]
        tensors = {tensor.name.removeprefix(f"{name}."): tensor.read() for tensor in stored}
        bias = tensors.pop("bias", None)
        try:
            weight = modules.build(spec, tensors, bias).dense()
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from error
        bias = weight.new_zeros(spec["out"]) if bias is None else bias
        rows, width = shape_of(self.model, name)
        if rows > spec["out"]:
            pieces = self._pieces(name, rows)
            weight, bias = _filled(weight, rows, pieces), _filled(bias, rows, pieces)
        return torch.nn.functional.pad(weight, (0, width - spec["in"])), bias

    def _pieces(self, name: str, rows: int) -> int:
        """Return of how many equal slices a layer's lost rows are: 2 where gate and up are fused, else 1."""
        given = self.layout[name]["out"]
        for other, spec in self.layout.items():
            width = shape_of(self.model, other)[1]
            reads = other.rpartition(".")[0] == name.rpartition(".")[0] and spec["in"] < width
            if reads and given % spec["in"] == 0 and rows == width * (given // spec["in"]):
                return int(given // spec["in"])
        raise ValueError(
            f"module {name!r} lost rows ({given} of {rows} are left), no layer beside it the columns that read them: "
            "its dense shape cannot be restored"
        )


def _dense_model(config: PretrainedConfig, layout: Layout) -> tuple[dict[str, Any], PreTrainedModel]:
    """Return a dense skeleton the folded weights go into, and how its config differs from the one given."""
    first = skeleton(config, torch.float32)
    modules.swap(copy.deepcopy(first), layout)
    resized = any(shape_of(first, name) != (spec["out"], spec["in"]) for name, spec in layout.items())
    widths = {(shape_of(first, name)[1], spec["in"]) for name, spec in layout.items()}
    lost = [pair for pair in widths if pair[1] < pair[0]]
    keys = config.to_dict()
    narrower = [{key: lost[0][1]} for key, value in keys.items() if len(lost) == 1 and value == lost[0][0]]
    flags = [key for key, value in keys.items() if value is False and "bias" in key]
    biased: list[dict[str, Any]] = [{}]
    if any(spec["bias"] and first.get_submodule(name).bias is None for name, spec in layout.items()):
        biased = [*({key: True} for key in flags), dict.fromkeys(flags, True)]
    # First what gives the very shapes of the compressed model, then what leaves a gap to fill.
    for width, bias in [*product(narrower, biased), *product([{}], biased)]:
        model = changed(config, {**width, **bias}) if width or bias else first
        if model is not None and _holds(model, first, layout, exact=bool(width) or not resized):
            return {**width, **bias}, model
    names = sorted(name for name, spec in layout.items() if spec["bias"] and first.get_submodule(name).bias is None)
    raise ValueError(f"{config.model_type} has no place for the bias of {names[:3]} ({len(names)} modules)")


def _holds(model: PreTrainedModel, first: PreTrainedModel, layout: Layout, exact: bool) -> bool:
    """Return whether a skeleton has the layout's shapes (or the first one's), its biases, and else the first one's."""
    for name, spec in layout.items():
        wanted = (spec["out"], spec["in"]) if exact else shape_of(first, name)
        if shape_of(model, name) != wanted or (spec["bias"] and model.get_submodule(name).bias is None):
            return False
    before = {name: parameter.shape for name, parameter in first.named_parameters()}
    after = {name: parameter.shape for name, parameter in model.named_parameters()}
    replaced = {f"{name}.{leaf}" for name in layout for leaf in ("weight", "bias")}
    return all(before[name] == after.get(name) for name in before if name not in replaced) and all(
        name in before or name.endswith(".bias") for name in after
    )


def _filled(tensor: Shaped[Tensor, "out *in"], rows: int, pieces: int) -> Shaped[Tensor, "rows *in"]:
    """Return the tensor with rows of zeros after each of its slices, so that it has `rows`."""
    sliced = tensor.unflatten(0, (pieces, -1))
    new = tensor.new_zeros(pieces, rows // pieces, *tensor.shape[1:])
    new[:, : sliced.shape[1]] = sliced
    return new.flatten(0, 1)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _zeros(name: str, shape: torch.Size, dtype: torch.dtype) -> Item:
    return Item({name: (dtype, tuple(shape))}, lambda: {name: torch.zeros(shape, dtype=dtype)})
