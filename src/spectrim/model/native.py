"""Find the configuration under which an architecture has given shapes by itself, without modules of ours."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from spectrim.model import modules
from spectrim.model.checkpoint import skeleton

logger = logging.getLogger(__name__)


def native_width(config: PretrainedConfig, layout: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The one change to `config` that gives all `dense` modules of a layout their sizes, and changes no other shape.

    Empty if the layout has none, if their widths differ, or if no key says it (BLOOM's FFN is always 4 × hidden).
    """
    resized = {name: (spec["out"], spec["in"]) for name, spec in layout.items() if spec["format"] == "dense"}
    if not resized:
        return {}
    first = skeleton(config, torch.float32)
    widths = {(shape_of(first, name)[1], columns) for name, (_, columns) in resized.items()}
    lost = [pair for pair in widths if pair[1] < pair[0]]
    if len(lost) != 1:
        return {}
    (before, after), values = lost[0], config.to_dict()
    # None: a width left to the architecture (GPT-2's n_inner)
    for key in sorted(values, key=lambda key: (values[key] is None, key)):
        if values[key] is None or (type(values[key]) is int and values[key] == before):
            model = changed(config, {key: after})
            if model is not None and _fits(model, first, resized):
                return {key: after}
    return {}


def _fits(model: PreTrainedModel, first: PreTrainedModel, resized: Mapping[str, tuple[int, int]]) -> bool:
    own = {f"{name}.{leaf}" for name in resized for leaf in ("weight", "bias")}
    before = {name: parameter.shape for name, parameter in first.named_parameters() if name not in own}
    after = {name: parameter.shape for name, parameter in model.named_parameters() if name not in own}
    return before == after and all(shape_of(model, name) == shape for name, shape in resized.items())


def changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PreTrainedModel | None:
    """The skeleton of a changed configuration; None if no model has it."""
    try:
        other = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(other, key, value)
        return skeleton(other, torch.float32)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        # whatever a class raises for a value that it cannot have
        logger.debug("no model has %s: %s", dict(changes), error)
        return None


def shape_of(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """(out, in) of a linear layer, however it stores its weight."""
    module = model.get_submodule(name)
    rows, width = module.get_parameter("weight").shape
    return (width, rows) if modules.is_transposed(module) else (rows, width)
