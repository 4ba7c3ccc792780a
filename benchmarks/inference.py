"""Speed of a compressed model against its dense one: prefill and decode, plain factors and the pivot form.

The factors are random: speed does not depend on their values. Ranks are those a uniform plan gives at the ratio. The
figure is the speed-up as a share of what parameters alone would give: dense / compressed parameters of the whole model.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import common
from benchmarks.common import Bound, Case
from spectrim.core import budget
from spectrim.measure.speed import speed
from spectrim.model import modules, targets

RATIO = 0.4
SHARE = Bound("at least", 0.85)
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 4096, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


def dense_model(shape: dict[str, Any]) -> PreTrainedModel:
    """A Llama of random weights, float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def compressed_model(dense: PreTrainedModel, ratio: float, format: str) -> PreTrainedModel:
    """A copy with random factors of uniform ranks in every target's place; format: `plain` or `pivot`."""
    model = copy.deepcopy(dense)
    structure, kind = targets.find(model), budget.RANK_FORMATS[format]
    ranks = budget.even_ranks(structure.targets, budget.allowed(structure.targets, ratio), kind)
    layout: dict[str, dict[str, Any]] = {}
    for target in structure.targets:
        part, rank = target.parts[0], ranks[target.name]
        if rank is not None:
            spec = {"format": kind, "in": part.in_features, "out": part.out_features, "bias": False, "rank": rank}
            layout[part.module] = {**spec, "side": "rows"} if kind == "pivot" else spec
    modules.swap(model, layout)
    for name in layout:
        _fill(model.get_submodule(name))
    return model


def _fill(module: nn.Module) -> None:
    """Random factors; a random order where the format has one."""
    state = module.state_dict()
    for name, tensor in state.items():
        random = torch.randn_like(tensor) * 0.02 if tensor.is_floating_point() else torch.randperm(len(tensor))
        state[name] = random.to(tensor.dtype)
    module.load_state_dict(state)


def parameters(model: nn.Module) -> int:
    """Floating-point numbers in a model."""
    return sum(p.numel() for p in model.parameters())


def cases(
    shape: dict[str, Any], prompt_tokens: int, new_tokens: int, rounds: int, repeats: int, formats: Sequence[str]
) -> list[Case]:
    """Prefill and decode of each format; `rounds` measurements of each, in turns, every one a median of `repeats`."""
    dense = dense_model(shape)
    models = {format: compressed_model(dense, RATIO, format) for format in formats}
    measured: dict[str, list[dict[str, Any]]] = {format: [] for format in formats}
    for _ in range(rounds):
        for format, model in models.items():
            measured[format].append(speed(model, dense, prompt_tokens, new_tokens, repeats=repeats, threads=1))
    made = []
    for format, model in models.items():
        by_parameters = parameters(dense) / parameters(model)
        for phase in ("prefill", "decode"):
            speedups = [found[phase]["ratio"] for found in measured[format]]
            details = {
                "speed_up": statistics.median(speedups),
                "dense_over_compressed_parameters": by_parameters,
                "dense_seconds": statistics.median(found[phase]["reference_seconds"] for found in measured[format]),
                "compressed_seconds": statistics.median(found[phase]["model_seconds"] for found in measured[format]),
            }
            values = tuple(value / by_parameters for value in speedups)
            made.append(Case(f"{format} {phase}", values, 1, "share", SHARE, details, repeats))
    return made


def measure() -> dict[str, object]:
    """Both formats at 40 %: 256 tokens of prompt, 32 new ones, batch 1."""
    made = cases(SHAPE, 256, 32, 3, 5, ("plain", "pivot"))
    settings = {"ratio": RATIO, "prompt_tokens": 256, "new_tokens": 32, "batch": 1, "dtype": "float32", **SHAPE}
    return common.result("inference", made, settings)


if __name__ == "__main__":
    common.write(Path(sys.argv[1]), measure())
