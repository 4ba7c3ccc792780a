"""Turn a plan into modules: in a live model, or streamed from one checkpoint into another."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.core import linalg
from spectrim.core.plan import Candidate, Choice, Plan, Target
from spectrim.core.progress import Progress, silent
from spectrim.core.store import write_json
from spectrim.model import loading, modules, targets
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.files import DTYPES, config_json
from spectrim.model.quantizer import guard_name
from spectrim.model.writer import Item, write_shards

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
# What a checkpoint holds beside weights and configuration: tokenizer, templates, generation settings, licence.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*")


def layout_of(plan: Plan, structure: targets.Structure, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The layout of a plan: module name → spec."""
    layout = {}
    for target in structure.targets:
        choice = plan.choices.get(target.name)
        for part in target.parts if choice is not None else ():
            assert choice is not None
            has_bias = model.get_submodule(part.module).bias is not None
            layout[part.module] = spec_of(choice, part.module, part.out_features, part.in_features, has_bias)
    return layout


def spec_of(choice: Choice, module: str, out_features: int, in_features: int, bias: bool) -> dict[str, Any]:
    """The spec of one module under a choice."""
    spec = {"format": choice.formats[module], "in": in_features, "out": out_features, "bias": bias or choice.bias}
    spec["rank"] = choice.counts["rank"]
    if spec["format"] == "pivot":
        spec["side"] = "rows"
    return spec


def form(spec: Mapping[str, Any], cut: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module of `spec` from a cut (`left`, `right`), in `dtype`, by state-dict name."""
    left, right = cut["left"], cut["right"]
    if spec["rank"] == 0:
        return {}
    if spec["format"] == "low_rank":
        return {"left.weight": left.to(dtype), "right.weight": right.to(dtype)}
    base, mix, order = linalg.pivot_rows(left, right, dtype)
    tensors = {"base.weight": base.to(dtype), "order": order.to(torch.int32)}
    return tensors if mix.numel() == 0 else {**tensors, "mix.weight": mix.to(dtype)}


@torch.no_grad()
def live(
    model: PreTrainedModel,
    structure: targets.Structure,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    progress: Progress = silent,
) -> PreTrainedModel:
    """Swap the modules of a loaded model in place; the result is what `from_pretrained` of its saved form gives."""
    layout = layout_of(plan, structure, model)
    for i, target in enumerate(t for t in structure.targets if t.name in plan.choices):
        cut = candidates[target.name].cut(plan.choices[target.name])
        for part in target.parts:
            old = model.get_submodule(part.module)
            weight = old.weight
            assert isinstance(weight, nn.Parameter)
            tensors = form(layout[part.module], cut[part.module], weight.dtype)
            new = modules.FORMATS[layout[part.module]["format"]].build(layout[part.module], tensors, _bias(old))
            parent, _, leaf = part.module.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.to(weight.device).train(old.training))
        progress("write", i + 1, len(plan.choices))
    if layout:
        loading.attach(model, layout)
    return model


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
    directory: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write the compressed checkpoint into `directory`: untouched tensors copied, factors in the others' place.

    dtype: cast floating-point tensors to it (None: as stored). Memory: the tensors of one target at a time.
    """
    layout = layout_of(plan, structure, checkpoint.model)
    replaced = {checkpoint.stored_key(f"{module}.weight"): module for module in layout}
    owners = {part.module: target for target in structure.targets for part in target.parts}
    items = []
    for key in checkpoint.where:
        if key in replaced:
            module = replaced[key]
            items.append(_factors(checkpoint, key, layout[module], owners[module], plan, candidates, dtype))
        else:
            items.append(_copy(checkpoint, key, dtype))
    guard = guard_name(layout)
    if guard is not None:
        key = checkpoint.stored_key(f"{guard}.weight")
        empty = torch.zeros(0, dtype=dtype or checkpoint.stored_dtype)
        items.append(Item({key: (empty.dtype, (0,))}, lambda: {key: empty}))
    write_shards(directory, items, shard_bytes, lambda done, total: progress("write", done, total))
    _write_sides(checkpoint, layout, directory, dtype)


def _copy(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None) -> Item:
    with safe_open(checkpoint.where[key], framework="pt") as file:
        piece = file.get_slice(key)
        stored, shape = DTYPES[piece.get_dtype()], tuple(piece.get_shape())
    kept = dtype if dtype is not None and stored.is_floating_point else stored
    return Item({key: (kept, shape)}, lambda: {key: checkpoint.read_key(key).to(kept)})


def _factors(
    checkpoint: Checkpoint,
    key: str,
    spec: Mapping[str, Any],
    target: Target,
    plan: Plan,
    candidates: Mapping[str, Candidate],
    dtype: torch.dtype | None,
) -> Item:
    kind = dtype or checkpoint.dtype_of(key)
    prefix = key.removesuffix("weight")
    empty = modules.empty(spec, device="meta", dtype=kind).state_dict()
    # the bias keeps its name, so it is copied like every other tensor
    shapes = {f"{prefix}{name}": (t.dtype, tuple(t.shape)) for name, t in empty.items() if name != "bias"}

    def make() -> dict[str, Tensor]:
        (cut,) = candidates[target.name].cut(plan.choices[target.name]).values()
        return {f"{prefix}{name}": tensor for name, tensor in form(spec, cut, kind).items()}

    return Item(shapes, make)


def _write_sides(
    checkpoint: Checkpoint, layout: dict[str, dict[str, Any]], directory: Path, dtype: torch.dtype | None
) -> None:
    for pattern in SIDE_FILES:
        for file in checkpoint.directory.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, directory / file.name)
    config = config_json(checkpoint.directory)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if layout:
        loading.write_config(directory, config, layout, type(checkpoint.config), type(checkpoint.model))
    else:  # everything stays dense: an ordinary checkpoint
        write_json(directory / "config.json", config)
