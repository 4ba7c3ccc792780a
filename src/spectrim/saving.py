"""How a tuned model is written: in the dtype that it is stored in, with what lay beside it and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim import finished
from spectrim.core.store import write_json
from spectrim.finetune.parts import parts_of
from spectrim.model import apply, loading, modules
from spectrim.model.checkpoint import quiet
from spectrim.model.loading import CODE_FILE


@torch.no_grad()
def lowered(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in the dtype it is stored in. Pivot forms are built anew, base and mix rounded together."""
    for name, module in list(model.named_modules()):
        if isinstance(module, modules.Pivot) and dtype.itemsize < 4:
            bias = module.bias
            tensors = apply.form(module.spec(), parts_of(module), dtype)
            new = modules.build(module.spec(), tensors, None if bias is None else bias.to(dtype))
            model.set_submodule(name, new.to(next(module.parameters()).device))
    made: PreTrainedModel = nn.Module.to(model, dtype)
    made.config.dtype = dtype
    return made


def save(model: PreTrainedModel, source: Path, directory: Path, record: Any, facts: Any, request: str) -> None:
    """Write a tuned model into `directory`; source: what it was tuned from, whose other files go with it.

    record: what is added to `finetuning` in `spectrim.json`; facts: `run.json`; request: see `finished.record`.
    """
    for pattern in apply.SIDE_FILES:
        for file in source.glob(pattern):
            if file.name not in ("config.json", CODE_FILE) and not file.name.endswith(".index.json"):
                shutil.copyfile(file, directory / file.name)
    with quiet():
        if getattr(model.config, "quantization_config", None) is None:
            model.save_pretrained(directory)
        else:
            loading.save(model, directory)
    described = directory / "spectrim.json"
    summary = json.loads(described.read_text(encoding="utf-8")) if described.exists() else {}
    summary["finetuning"] = [*summary.get("finetuning", ()), record]
    write_json(described, {**summary, **finished.record(directory, request)})
    write_json(directory / "run.json", facts)
