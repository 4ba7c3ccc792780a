"""Turn a plan into modules: in a live model, or streamed from one checkpoint into another."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.core import budget, distributed, heap, linalg
from spectrim.core.plan import Candidate, Choice, Part, Plan, Target
from spectrim.core.progress import Progress, silent
from spectrim.core.store import write_json
from spectrim.model import loading, modules, targets
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.files import DTYPES, config_json
from spectrim.model.native import native_width
from spectrim.model.quantizer import guard_name
from spectrim.model.writer import Item, delivered, write_shards

logger = logging.getLogger(__name__)

Modules = dict[str, nn.Module]

SHARD_BYTES = 5 * 10**9
# What a checkpoint holds beside weights and configuration: tokenizer, templates, generation settings, licence.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")


@dataclass(frozen=True)
class Placed:
    """Where a plan's modules go: their specs, which of them the architecture has by itself under a changed config."""

    specs: Mapping[str, dict[str, Any]]
    owners: Mapping[str, Target]
    config: Mapping[str, int]

    @property
    def layout(self) -> dict[str, dict[str, Any]]:
        """The layout to save: what needs modules of ours."""
        return {
            name: spec
            for name, spec in self.specs.items()
            if not (spec["format"] == "dense" and (self.config or spec == self._dense(name)))
        }

    def _dense(self, name: str) -> dict[str, Any]:
        """The spec of a module as it was."""
        part = next(part for part in self.owners[name].parts if part.module == name)
        return {"format": "dense", "in": part.in_features, "out": part.out_features, "bias": part.bias}


def placed(plan: Plan, structure: targets.Structure, model: PreTrainedModel) -> Placed:
    """The modules of a plan; FFNs that all keep one width become native, by a smaller width in the configuration."""
    specs, owners = {}, {}
    for target in (*structure.targets, *structure.ffns):
        choice = plan.choices.get(target.name)
        for part in target.parts if choice is not None else ():
            assert choice is not None
            specs[part.module], owners[part.module] = spec_of(choice, target, part), target
    return Placed(specs, owners, native_width(model.config, specs))


def spec_of(choice: Choice, target: Target, part: Part) -> dict[str, Any]:
    """The spec of one module under a choice."""
    out_features, in_features = budget.sizes(choice, target, part)
    format, columns = choice.formats[part.module], choice.counts.get("column", 0)
    spec = {"format": format, "in": in_features, "out": out_features, "bias": part.bias or choice.bias}
    if format == "dense":
        return spec
    spec["rank"] = choice.counts["rank"]
    if format == "low_rank_columns":
        spec["kept"] = columns
    if format in budget.WITH_ENTRIES.values():
        nnz = choice.counts["entry"]
        spec |= {"nnz": nnz, "index": modules.smaller_index(out_features, in_features, nnz)}
    if format == "pivot":
        spec["side"] = "columns" if columns else "rows"
        if columns:
            spec["kept"] = columns
    return spec


def form(spec: Mapping[str, Any], cut: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module of `spec` from a cut, in `dtype`, by state-dict name; without its bias."""
    if spec["format"] == "dense":
        return {"weight": cut["weight"].to(dtype)}
    if spec["format"] == "pivot":
        return _pivot(spec, cut, dtype)
    if "nnz" in spec:
        sparse = {"values": cut["values"].to(dtype), **modules.stored_index(spec, cut["entries"])}
        pair = {**spec, "format": "pivot", "side": "rows"} if spec["format"] == "pivot_sparse" else None
        return sparse | (_pivot(pair, cut, dtype) if pair else _pair(spec, cut, dtype))
    tensors = {}
    if spec["format"] == "low_rank_columns":
        tensors = {"kept.weight": cut["kept"].to(dtype), "columns": cut["columns"].to(torch.int32)}
    return tensors | _pair(spec, cut, dtype)


def _pair(spec: Mapping[str, Any], cut: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{side}.weight": cut[side].to(dtype) for side in ("left", "right") if spec["rank"]}


def _pivot(spec: Mapping[str, Any], cut: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Pivot rows; beside kept columns pivot columns, so that one product serves both."""
    if spec["side"] == "rows":
        if spec["rank"] == 0:
            return {}
        base, mix, order = linalg.pivot_rows(cut["left"], cut["right"], dtype)
    else:
        kept, columns = cut["kept"], cut["columns"]
        free = torch.ones(spec["in"], dtype=torch.bool, device=columns.device)
        free[columns] = False
        others = free.nonzero().flatten()
        base, mix, order = kept, kept.new_zeros(0, 0), torch.arange(len(others), device=columns.device)
        if spec["rank"]:
            pivots, mix, order = linalg.pivot_columns(cut["left"], cut["right"], dtype)
            base = torch.cat([kept.to(dtype), pivots.to(dtype)], dim=1)
        order = torch.cat([columns, others[order.to(others.device)]])
    tensors = {"base.weight": base.to(dtype), "order": order.to(torch.int32)}
    return tensors if mix.numel() == 0 else {**tensors, "mix.weight": mix.to(dtype)}


def bias_of(cut: Mapping[str, Tensor], bias: Tensor | None) -> Tensor | None:
    """The bias of a module after a cut: rows that stay, an offset added."""
    if bias is not None and "rows" in cut:
        bias = bias[cut["rows"].to(bias.device)]
    if "offset" in cut:
        offset = cut["offset"]
        bias = offset if bias is None else (bias.to(offset) + offset).to(bias)
    return bias


@torch.no_grad()
def built(target: Target, choice: Choice, cut: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> Modules:
    """The modules of one target under a choice, by name, in the dtype and on the device of the model's own."""
    made: Modules = {}
    for part in target.parts:
        old = model.get_submodule(part.module)
        weight = old.weight
        assert isinstance(weight, Tensor)
        spec, tensors = spec_of(choice, target, part), cut[part.module]
        bias = bias_of(tensors, _bias(old))
        new = modules.build(
            spec, form(spec, tensors, weight.dtype), None if bias is None else bias.to("cpu", weight.dtype)
        )
        made[part.module] = new.to(weight.device).train(old.training)
    return made


@torch.no_grad()
def live(
    model: PreTrainedModel,
    structure: targets.Structure,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    progress: Progress = silent,
) -> PreTrainedModel:
    """Swap the modules of a loaded model in place; the result is what `from_pretrained` of its saved form gives.

    Several processes, each with its copy, cut a share of the targets for all.
    """
    place = placed(plan, structure, model)
    changed = list(dict.fromkeys(place.owners.values()))
    owners = distributed.deal([float(target.parameters) for target in changed], [0.0] * distributed.world())
    for i, target in enumerate(changed):
        choice = plan.choices[target.name]
        cut = distributed.cut_by(owners[i], partial(candidates[target.name].cut, choice))
        for name, new in built(target, choice, cut, model).items():
            old = model.get_submodule(name)
            model.set_submodule(name, new if name in place.layout else _resized(old, new))
        progress("write", i + 1, len(plan.choices))
    for key, value in place.config.items():
        setattr(model.config, key, value)
    if place.layout:
        loading.attach(model, place.layout)
    return model


def _resized(old: nn.Module, new: nn.Module) -> nn.Module:
    """A module of the architecture's own class with fewer rows or columns."""
    weight, bias = new.get_parameter("weight").detach(), new.bias
    transposed = modules.is_transposed(old)
    with torch.device("meta"):
        rows, columns = weight.shape
        own: nn.Module = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows, bias is not None)
    own.register_parameter("weight", nn.Parameter(weight.T.contiguous() if transposed else weight))
    if isinstance(bias, Tensor):
        own.register_parameter("bias", nn.Parameter(bias.detach()))
    return own.train(old.training)


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


@torch.no_grad()
def streamed(
    checkpoint: Checkpoint,
    structure: targets.Structure,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    directory: Path | None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write the compressed checkpoint into `directory`: untouched tensors copied, factors in the others' place.

    dtype: cast floating-point tensors to it (None: as stored). Memory: the tensors of one target at a time. Of several
    processes the first one writes; the others, without a directory, make a share of the factors for it.
    """
    place = placed(plan, structure, checkpoint.model)
    items, costs = pieces(checkpoint, place, plan, candidates, dtype)
    with delivered(items, costs) as ready:
        if directory is not None:
            _write(checkpoint, place, ready, directory, dtype, shard_bytes, progress)


def pieces(
    checkpoint: Checkpoint,
    place: Placed,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    dtype: torch.dtype | None = None,
) -> tuple[list[Item], list[float]]:
    """All that `streamed` writes, in its order, and what making each costs; candidates are read when one is made."""
    stored = {checkpoint.names.get(key, key): key for key in checkpoint.where}
    replaced = {checkpoint.stored_key(f"{module}.weight"): module for module in place.specs}
    # a bias goes with its weight: it may lose rows, or get an offset
    biases = {key for name, key in stored.items() if name.removesuffix(".bias") in place.specs and key not in replaced}
    items: list[Item] = []
    costs: list[float] = []
    for key in checkpoint.where:
        if key in replaced:
            module = replaced[key]
            bias = stored.get(f"{module}.bias", f"{key.removesuffix('weight')}bias")
            items.append(_module(checkpoint, key, bias, module, place, plan, candidates, dtype))
            costs.append(float(place.owners[module].parameters))
        elif key not in biases:
            items.append(_copy(checkpoint, key, dtype))
            costs.append(0.0)
    guard = guard_name(place.layout)
    if guard is not None:
        key = checkpoint.stored_key(f"{guard}.weight")
        empty = torch.zeros(0, dtype=dtype or checkpoint.stored_dtype)
        items.append(Item({key: (empty.dtype, (0,))}, lambda: {key: empty}))
        costs.append(0.0)
    return items, costs


def _write(
    checkpoint: Checkpoint,
    place: Placed,
    items: list[Item],
    directory: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Progress,
) -> None:
    """The shards, and what lies beside them."""
    heap.give_back()  # factorisations of small matrices leave holes
    write_shards(directory, items, shard_bytes, lambda done, total: progress("write", done, total))
    _write_sides(checkpoint, place, directory, dtype)


def _copy(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None) -> Item:
    with safe_open(checkpoint.where[key], framework="pt") as file:
        piece = file.get_slice(key)
        stored, shape = DTYPES[piece.get_dtype()], tuple(piece.get_shape())
    kept = dtype if dtype is not None and stored.is_floating_point else stored
    return Item({key: (kept, shape)}, lambda: {key: checkpoint.read_key(key).to(kept)})


def _module(
    checkpoint: Checkpoint,
    key: str,
    bias_key: str,
    module: str,
    place: Placed,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    dtype: torch.dtype | None,
) -> Item:
    """All tensors of one module, its bias too."""
    spec, target = place.specs[module], place.owners[module]
    kind, had_bias = dtype or checkpoint.dtype_of(key), bias_key in checkpoint.where
    bias_kind = dtype or (checkpoint.dtype_of(bias_key) if had_bias else kind)
    prefix = key.removesuffix("weight")
    turned = module not in place.layout and modules.is_transposed(checkpoint.model.get_submodule(module))

    def full(name: str) -> str:
        return bias_key if name == "bias" else f"{prefix}{name}"

    shapes = {}
    for name, t in modules.empty(spec, device="meta", dtype=kind).state_dict().items():
        shape = tuple(t.shape)
        shapes[full(name)] = (bias_kind if name == "bias" else t.dtype, shape[::-1] if turned else shape)

    def make() -> dict[str, Tensor]:
        cut = candidates[target.name].cut(plan.choices[target.name])[module]
        tensors = form(spec, cut, kind)
        if turned:
            tensors["weight"] = tensors["weight"].T.contiguous()
        bias = bias_of(cut, checkpoint.read_key(bias_key) if had_bias else None)
        made = {full(name): tensor for name, tensor in tensors.items()}
        return made if bias is None else {**made, bias_key: bias.to(bias_kind)}

    return Item(shapes, make)


def _write_sides(checkpoint: Checkpoint, place: Placed, directory: Path, dtype: torch.dtype | None) -> None:
    for pattern in SIDE_FILES:
        for file in checkpoint.directory.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, directory / file.name)
    layout, config = place.layout, {**config_json(checkpoint.directory), **place.config}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if layout:
        loading.write_config(directory, config, layout, type(checkpoint.config), type(checkpoint.model))
    else:  # everything stays dense: an ordinary checkpoint
        write_json(directory / "config.json", config)
