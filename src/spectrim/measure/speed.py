"""Time of prefill and decode of a model against its dense reference, both measured in one run, in turns."""

from __future__ import annotations

import inspect
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.measure.evaluate import inference, max_positions

logger = logging.getLogger(__name__)

_SEED = 0
_PHASES = ("prefill", "decode")


def speed(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    threads: int | None = None,
) -> dict[str, Any]:
    """How many times faster than the dense reference a model reads a prompt (prefill) and writes tokens (decode).

    The two take turns, reference first, after one turn each that is not counted, on the same random tokens. Decode is
    `new_tokens` steps of one token with the KV cache of the prefill. threads: torch threads while measuring, by default
    as they are. Returned: prefill and decode, each {"ratio": reference / model, of the medians; "model_seconds" and
    "reference_seconds": medians, of all the steps; "model_spread" and "reference_spread": (slowest − fastest) / its
    median}, with the conditions beside them. Raises ValueError for fewer than 5 repeats, and for models that differ in
    dtype or device, keep no KV cache or have too few positions.
    """
    models = {"reference": reference, "model": model}
    _check(models, prompt_tokens, new_tokens, batch, repeats, threads)
    ids = _random_ids(models, batch, prompt_tokens + new_tokens)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with _threads(threads), inference(model), inference(reference):
        for turn in range(repeats + 1):
            for name, one in models.items():
                times = _prefill_and_decode(one, ids, prompt_tokens)
                if turn > 0:  # the first turn warms up: memory, caches, compiled kernels
                    seconds[name].append(times)
            logger.info("speed: turn %d of %d", turn, repeats)
        used_threads = torch.get_num_threads()
    result: dict[str, Any] = {phase: _summary(seconds, column) for column, phase in enumerate(_PHASES)}
    return result | {
        "repeats": repeats,
        "threads": used_threads,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "shapes": {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
    }


def _check(
    models: dict[str, PreTrainedModel],
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    threads: int | None,
) -> None:
    if repeats < 5:
        raise ValueError(f"a median of {repeats} repeats says too little: at least 5")
    if min(prompt_tokens, new_tokens, batch) < 1 or (threads is not None and threads < 1):
        raise ValueError(
            f"prompt_tokens ({prompt_tokens}), new_tokens ({new_tokens}), batch ({batch}) and threads ({threads}) must "
            "be at least 1"
        )
    for name, one in models.items():
        limit = max_positions(one)
        if limit is not None and prompt_tokens + new_tokens > limit:
            raise ValueError(
                f"{prompt_tokens} tokens of prompt and {new_tokens} new ones exceed the {limit} positions of the {name}"
            )
    model, reference = models["model"], models["reference"]
    if (model.dtype, model.device) != (reference.dtype, reference.device):
        raise ValueError(
            f"the model is {model.dtype} on {model.device}, the reference {reference.dtype} on {reference.device}: "
            "their times say nothing about compression; load both alike"
        )


def _random_ids(models: dict[str, PreTrainedModel], batch: int, length: int) -> Int[Tensor, "batch length"]:
    vocabulary = min(one.config.get_text_config().vocab_size for one in models.values())
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(models["model"].device)


def _prefill_and_decode(
    model: PreTrainedModel, ids: Int[Tensor, "batch length"], prompt_tokens: int
) -> tuple[float, float]:
    """Seconds for the prompt, and for the rest of the ids one at a time: they are given, so choosing costs nothing."""
    # as generation does: of the prompt only the last logits are wanted
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    started = _now(model.device)
    cache = getattr(model(input_ids=ids[:, :prompt_tokens], use_cache=True, **last_only), "past_key_values", None)
    read = _now(model.device)
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no KV cache: its decoding cannot be timed step by step")
    for position in range(prompt_tokens, ids.shape[1]):
        step = ids[:, position : position + 1]
        cache = model(input_ids=step, past_key_values=cache, use_cache=True).past_key_values
    return read - started, _now(model.device) - read


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # what was only queued so far belongs to the time before
    return time.perf_counter()


def _summary(seconds: dict[str, list[tuple[float, float]]], column: int) -> dict[str, float]:
    summary = {}
    for name, times in seconds.items():
        phase = [pair[column] for pair in times]
        middle = statistics.median(phase)
        summary[f"{name}_seconds"] = middle
        summary[f"{name}_spread"] = (max(phase) - min(phase)) / middle
    return {"ratio": summary["reference_seconds"] / summary["model_seconds"], **summary}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
