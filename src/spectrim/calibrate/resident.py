"""Calibration with the whole model in memory, forwards and backwards: for statistics that need gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.calibrate.collect import BlockStatistics, Collector, Wanted, without_dropout
from spectrim.core.progress import Progress, silent
from spectrim.model.blocks import Batch
from spectrim.model.targets import Structure


def resident(
    model: PreTrainedModel,
    structure: Structure,
    batches: Sequence[Batch],
    wanted: Mapping[int, Wanted],
    progress: Progress = silent,
) -> Iterator[tuple[int, BlockStatistics]]:
    """Yield (block index, its statistics) for each block in `wanted`, in order.

    Gradients are those of the token-mean cross-entropy of one sequence at a time; each is used and freed as soon as
    it is complete. Raises ValueError when a loss is not finite.
    """
    collectors = {
        index: Collector(model, structure.block(index), structure.of_block(index), of_block, model.device)
        for index, of_block in wanted.items()
        if of_block
    }
    backwards = any(of_block.gradients() for of_block in wanted.values())
    learning = {name for of_block in wanted.values() for name in of_block.gradients()}
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name.removesuffix(".weight") in learning and name.endswith(".weight"))
    single = _singly(batches) if backwards else list(batches)
    try:
        with ExitStack() as stack:
            stack.enter_context(without_dropout(model))
            for collector in collectors.values():
                stack.enter_context(collector)
            for i, batch in enumerate(single):
                for collector in collectors.values():
                    collector.mask, collector.sequences = batch.mask, len(batch.ids)
                _pass(model, batch, backwards, i)
                progress("calibrate", i + 1, len(single))
    finally:
        for name, parameter in model.named_parameters():
            learns, parameter.grad = before[name]
            parameter.requires_grad_(learns)
    for index, collector in collectors.items():
        yield index, collector.result()


def _singly(batches: Sequence[Batch]) -> list[Batch]:
    return [
        Batch(batch.ids[i : i + 1], None if batch.mask is None else batch.mask[i : i + 1])
        for batch in batches
        for i in range(len(batch.ids))
    ]


def _pass(model: PreTrainedModel, batch: Batch, backwards: bool, index: int) -> None:
    ids = batch.ids.to(model.device)
    mask = None if batch.mask is None else batch.mask.to(model.device)
    with torch.set_grad_enabled(backwards):
        logits = model(input_ids=ids, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
        if backwards:
            loss = _loss(logits, ids, mask)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of calibration sequence {index} is not finite: calibration stopped")
            loss.backward()


def _loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    # a prediction made at a pad, or of one, is none of the sequence's
    labels = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten())
