"""Calibration with the whole model in memory, forwards and backwards: for statistics that need gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.calibrate.collect import BlockStatistics, Collector, Wanted, portion, without_dropout
from spectrim.calibrate.sampling import picked
from spectrim.calibrate.statistics import Labels
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

    Gradients are those of one sequence at a time, one backward pass for each kind of labels that a statistic wants of
    the one forward pass; each is used and freed as soon as it is complete. Several processes run a share each, and get
    the statistics of all. Raises ValueError when a loss is not finite.
    """
    collectors = {
        index: Collector(model, structure.block(index), structure.of_block(index), of_block, model.device)
        for index, of_block in wanted.items()
        if of_block
    }
    of_gradients = {name: chosen for of_block in wanted.values() for name, chosen in of_block.gradients().items()}
    every = sorted({(s.labels, s.one_of) for chosen in of_gradients.values() for s in chosen})
    learning = {name for name, chosen in of_gradients.items() if any(s.of == "weight" for s in chosen)}
    through = any(s.of == "output" for chosen in of_gradients.values() for s in chosen)
    single = _singly(batches) if every else list(batches)
    own = portion(single, wanted.values())
    size = max((len(batch.ids) for batch in batches), default=1)
    with ExitStack() as stack:
        stack.enter_context(_learning(model, learning))
        stack.enter_context(without_dropout(model))
        if through:
            stack.enter_context(_from_the_embedding(model))
        for collector in collectors.values():
            stack.enter_context(collector)
        for run in _runs(own, every, size):
            batch = _joined([single[i] for i in run])
            for collector in collectors.values():
                collector.mask, collector.sequences, collector.first = batch.mask, len(batch.ids), run[0]
            _pass(model, batch, _labels(run[0], every), list(collectors.values()), run[0])
            progress("calibrate", run[-1] - own[0] + 1, len(own))
    for index, collector in collectors.items():
        yield index, collector.result()


def _labels(sequence: int, every: Sequence[tuple[Labels, int]]) -> list[Labels]:
    """The kinds of labels whose loss is run backwards on a sequence."""
    return sorted({kind for kind, one_of in every if sequence % one_of == 0})


def _runs(own: Sequence[int], every: Sequence[tuple[Labels, int]], size: int) -> Iterator[list[int]]:
    """What runs at once, in order: a sequence that goes backwards alone, those between them up to `size` together."""
    together: list[int] = []
    for i in own:
        alone = bool(_labels(i, every)) or not every
        if together and (alone or len(together) == size):
            yield together
            together = []
        if alone:
            yield [i]
        else:
            together.append(i)
    if together:
        yield together


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    masks = [batch.mask for batch in batches]
    known = [torch.ones_like(b.ids, dtype=torch.bool) if m is None else m for b, m in zip(batches, masks, strict=True)]
    mask = None if all(m is None for m in masks) else torch.cat(known)
    return Batch(torch.cat([batch.ids for batch in batches]), mask)


@contextmanager
def _learning(model: PreTrainedModel, modules: Collection[str]) -> Iterator[None]:
    """Gradients of these modules' weights alone, none there at first; afterwards all as it was."""
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name.removesuffix(".weight") in modules and name.endswith(".weight"))
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            learns, parameter.grad = before[name]
            parameter.requires_grad_(learns)


@contextmanager
def _from_the_embedding(model: PreTrainedModel) -> Iterator[None]:
    """Gradients go back through every state, though no weight asks for one."""

    def start(_: nn.Module, __: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(start)
    try:
        yield
    finally:
        handle.remove()


def _singly(batches: Sequence[Batch]) -> list[Batch]:
    return [
        Batch(batch.ids[i : i + 1], None if batch.mask is None else batch.mask[i : i + 1])
        for batch in batches
        for i in range(len(batch.ids))
    ]


def _pass(
    model: PreTrainedModel, batch: Batch, labels: Sequence[Labels], collectors: Sequence[Collector], index: int
) -> None:
    ids = batch.ids.to(model.device)
    mask = None if batch.mask is None else batch.mask.to(model.device)
    attention = None if mask is None else mask.long()
    if not labels:  # nothing is asked of the vocabulary
        with torch.no_grad():
            model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        return
    with torch.enable_grad():
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        for kind in labels:
            loss = _loss(logits, ids, mask) if kind == "text" else _sampled_loss(logits, ids, mask)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of calibration sequence {index} is not finite: calibration stopped")
            for collector in collectors:
                collector.labels = kind
            loss.backward(retain_graph=kind != labels[-1])


def _loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    # a prediction made at a pad, or of one, is none of the sequence's
    labels = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten())


def _sampled_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Of every real token, the last one too: a label that is drawn need not be in the text."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    labels = sampled(logits[real], ids[real])
    return torch.nn.functional.cross_entropy(logits[real].float(), labels, reduction="sum")


@torch.no_grad()
def sampled(logits: Float[Tensor, "tokens vocabulary"], ids: Int[Tensor, "tokens"]) -> Int[Tensor, "tokens"]:
    """A label for each token, drawn from its prediction; the draw is seeded by the sequence's own tokens.

    So it depends neither on what else is measured, nor on the order of the sequences. 0 where a prediction is not
    finite: its loss is not either.
    """
    digest = hashlib.sha256(ids.cpu().to(torch.int64).numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    draws = torch.rand(len(ids), generator=generator, dtype=torch.float64).to(logits.device)
    return picked(logits, draws)[0]
