"""Walk the decoder blocks: record the arguments each is called with, and run them one by one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import PreTrainedModel

from spectrim.core import heap
from spectrim.core.plan import Target
from spectrim.model.targets import Structure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Token windows, and which of their tokens are real (None: all)."""

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Everything a block is called with beside its hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on a device."""
        return Call(*tree_map(partial(_leaf_to, device), (self.args, self.kwargs)))


def run(
    block: nn.Module, state: Float[Tensor, "batch length hidden"], call: Call
) -> Float[Tensor, "batch length hidden"]:
    """The hidden state leaving a block."""
    output = block(state, *call.args, **call.kwargs)
    result = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(result, Tensor)
    return result


class _Finished(Exception):
    """Raised by the last recorder: what follows the blocks is not wanted."""


class _Recorder(nn.Module):
    """Stands for a block: notes its arguments and hands its input on.

    It answers with a tuple of one: callers that expect a tuple take the first, others hand the tuple itself to the
    next recorder. Attributes of the block that the model reads (such as its attention type) are passed through.
    """

    def __init__(self, block: nn.Module, note: Callable[[Tensor, Call], None]):
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._note = note

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        state = args[0] if args else kwargs.pop("hidden_states")
        state = state[0] if isinstance(state, tuple) else state
        self._note(state, Call(tuple(args[1:]), kwargs))
        return (state,)


@contextmanager
def _replaced(model: nn.Module, name: str, modules: Sequence[nn.Module]) -> Iterator[None]:
    """The list of blocks, with other modules in it for a while."""
    parent = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    original = getattr(parent, leaf)
    setattr(parent, leaf, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(parent, leaf, original)


def record(
    model: PreTrainedModel, structure: Structure, batch: Batch
) -> tuple[Float[Tensor, "batch length hidden"], list[Call]]:
    """One dry pass over `batch`: the state entering block 0, and the call of each block. No block runs.

    What lies before the blocks must be loaded. Calls are recorded for every block: neighbours may get other masks.
    Raises ValueError for a model that does not call each of its blocks once.
    """
    mask = None if batch.mask is None else batch.mask.long()
    return _record(model, structure, {"input_ids": batch.ids, "attention_mask": mask})


@torch.no_grad()
def _record(model: PreTrainedModel, structure: Structure, inputs: dict[str, Any]) -> tuple[Tensor, list[Call]]:
    states: list[Tensor] = []
    calls: list[Call] = []

    def note(state: Tensor, call: Call) -> None:
        states.append(state)
        # most models call all their blocks alike: one object then stands for hundreds, in every batch
        calls.append(calls[-1] if calls and _alike(call, calls[-1]) else call)
        if len(calls) == structure.count:
            raise _Finished

    originals = list(model.get_submodule(structure.blocks).children())
    recorders = [_Recorder(block, note) for block in originals]
    with _replaced(model, structure.blocks, recorders):
        try:
            model(**inputs, use_cache=False)
        except _Finished:
            return states[0], calls
    raise ValueError(
        f"{type(model).__name__} called {len(calls)} of its {structure.count} blocks in one pass: not a plain decoder"
    )


def finish(
    model: PreTrainedModel,
    structure: Structure,
    ids: Int[Tensor, "batch length"],
    state: Float[Tensor, "batch length hidden"],
    tupled: bool | None = None,
) -> Float[Tensor, "batch length vocabulary"]:
    """The logits from the state leaving the last block: the model's own forward pass with blocks that only hand it on.

    Each stands for its block in the kind of answer too, a tensor or a tuple: callers do not take the one for the other.
    tupled: which one, where it is known; else the first block, which must be loaded then, is run on a token to see it.
    """
    originals = list(model.get_submodule(structure.blocks).children())
    if tupled is None:
        tupled = answers_tuple(model, structure, ids[:1, :1])
    with _replaced(model, structure.blocks, [_Injector(block, state, tupled) for block in originals]):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


class _Injector(_Recorder):
    """Stands for a block: answers with one state, whatever comes in."""

    def __init__(self, block: nn.Module, state: Tensor, tupled: bool):
        super().__init__(block, lambda state, call: None)
        self._answer = (state,) if tupled else state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer


@torch.no_grad()
def answers_tuple(model: PreTrainedModel, structure: Structure, ids: Int[Tensor, "1 1"]) -> bool:
    """Whether the model expects tuples of its blocks: its first one, which must be loaded, is run on a token."""
    state, calls = record(model, structure, Batch(ids))
    output = model.get_submodule(structure.block(0))(state, *calls[0].args, **calls[0].kwargs)
    return isinstance(output, (tuple, list))


def deduplicated(calls: list[Call], known: list[Call] | None) -> list[Call]:
    """`calls`, with every tensor that equals its counterpart in `known` replaced by that one, to hold it once."""
    if known is None:
        return calls
    shared: dict[tuple[int, int], Call] = {}
    for call, other in zip(calls, known, strict=True):
        pair = (id(call), id(other))
        if pair not in shared:
            shared[pair] = _share(call, other)
    return [shared[id(call), id(other)] for call, other in zip(calls, known, strict=True)]


def _alike(call: Call, other: Call) -> bool:
    """Whether both hold the same tensors, the very same ones, and equal plain values."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    others, other_spec = tree_flatten((other.args, other.kwargs))
    plain = (bool, int, float, str, torch.dtype)
    return spec == other_spec and all(
        a is b or (isinstance(a, plain) and type(a) is type(b) and a == b) for a, b in zip(leaves, others, strict=True)
    )


def _share(call: Call, known: Call) -> Call:
    leaves, spec = tree_flatten((call.args, call.kwargs))
    others, other_spec = tree_flatten((known.args, known.kwargs))
    if spec != other_spec:
        return call
    shared = [
        b if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b) else a
        for a, b in zip(leaves, others, strict=True)
    ]
    return Call(*tree_unflatten(shared, spec))


def share_inputs(model: PreTrainedModel, structure: Structure) -> Structure:
    """The structure with input keys: parts that read the very same tensor get one key, the first reader's name.

    Found by tensor identity in the model without weights (a copy, unless it is a skeleton): blocks on the meta device,
    one short sequence of zeros before them. Where a block cannot run there (experts chosen by data), what was not
    reached keeps its own key.
    """
    keys = _input_keys(_weightless(model), structure)
    return replace(structure, targets=_keyed(structure.targets, keys), ffns=_keyed(structure.ffns, keys))


def _input_keys(model: PreTrainedModel, structure: Structure) -> dict[str, str]:
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    batch = {"inputs_embeds": torch.zeros(1, 4, embedding.shape[1], dtype=model.dtype)}
    keys, meta = dict[str, str](), torch.device("meta")
    with _runnable(model, structure):
        state, calls = _record(model, structure, batch)
        for index, call in enumerate(calls):
            names = {t.parts[0].module for t in structure.of_block(index)}
            keys |= _keys_of_block(model, structure.block(index), names, state.to(meta), call.to(meta))
    return keys


def _keyed(targets: Sequence[Target], keys: Mapping[str, str]) -> tuple[Target, ...]:
    return tuple(
        replace(t, parts=tuple(replace(p, input=keys.get(p.module, p.module)) for p in t.parts)) for t in targets
    )


def _weightless(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration with all its parameters on the meta device: itself if they are there.

    A second skeleton beside the first would leave Python's memory in pieces, more with every block.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return model
    with heap.small(heap.TIGHT), init_empty_weights(include_buffers=False):
        return type(model)._from_config(copy.deepcopy(model.config)).eval()


@contextmanager
def _runnable(model: PreTrainedModel, structure: Structure) -> Iterator[None]:
    """For a while buffers of blocks are on the meta device too, and what lies beside blocks and embeddings is zeros."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    large = {id(p) for end in ends if end is not None for p in end.parameters()}
    inner = set(model.get_submodule(structure.blocks).modules())
    instead: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    for module in model.modules():
        if module in inner:
            held = [(name, buffer, buffer.to("meta")) for name, buffer in module.named_buffers(recurse=False)]
        else:
            held = [
                (name, p, nn.Parameter(torch.zeros_like(p, device="cpu"), requires_grad=False))
                for name, p in module.named_parameters(recurse=False)
                if id(p) not in large
            ]
        instead += [(module, *each) for each in held]
    for module, name, _, other in instead:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module, name, was, _ in instead:
            setattr(module, name, was)


def _leaf_to(device: torch.device, leaf: Any) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _keys_of_block(model: nn.Module, prefix: str, names: set[str], state: Tensor, call: Call) -> dict[str, str]:
    seen: list[tuple[Tensor, str]] = []
    keys: dict[str, str] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        first = next((known for tensor, known in seen if tensor is args[0]), None)
        keys[name] = first or name
        if first is None:
            seen.append((args[0], name))

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in sorted(names)]
    try:
        run(model.get_submodule(prefix), state, call)
    except (NotImplementedError, RuntimeError) as error:
        logger.debug("%s cannot run on the meta device (%s); keys found until there are kept", prefix, error)
    finally:
        for handle in handles:
            handle.remove()
    return keys
