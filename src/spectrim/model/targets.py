"""Find the decoder blocks and what can be compressed in them, by structure alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.core.plan import Part, Target

logger = logging.getLogger(__name__)

# The one table of roles: the longest suffix of a module's name that stands here decides; others are "other".
ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "attn.c_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "fc1": "up",
    "c_fc": "up",
    "fc_in": "up",
    "dense_h_to_4h": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "fc2": "down",
    "mlp.c_proj": "down",
    "fc_out": "down",
    "dense_4h_to_h": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "o",
}


@dataclass(frozen=True)
class Structure:
    """What was found: the name of the list of blocks, their number, the targets, and what is left dense and why.

    targets: one for each matrix; ffns: those of them that form an FFN, once more as wholes (role `ffn`).
    """

    blocks: str
    count: int
    targets: tuple[Target, ...]
    notes: tuple[str, ...]
    ffns: tuple[Target, ...] = ()

    def block(self, index: int) -> str:
        """Module name of a block."""
        return f"{self.blocks}.{index}"

    def of_block(self, index: int) -> list[Target]:
        """The targets in a block."""
        return [target for target in self.targets if index in target.blocks]

    def named(self, name: str) -> Target:
        """The target of that name, a matrix or an FFN."""
        return next(target for target in (*self.targets, *self.ffns) if target.name == name)


def role_of(name: str) -> str:
    """The role of a linear layer by the longest suffix of its name in ROLES, else `other`."""
    steps = name.split(".")
    for start in range(len(steps)):
        role = ROLES.get(".".join(steps[start:]))
        if role is not None:
            return role
    return "other"


def find_blocks(model: nn.Module) -> str:
    """Name of the list of decoder blocks: the ModuleList of one class that holds the most parameters.

    Raises ValueError if the model has none.
    """
    best, most = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > most:
                best, most = name, size
    if not best:
        raise ValueError(f"{type(model).__name__} has no list of equal decoder blocks: nothing to compress")
    return best


def find(model: PreTrainedModel) -> Structure:
    """All linear layers (nn.Linear, Conv1D) inside the blocks that can be compressed, each a target of one part.

    Left out: weights used twice (tied), matrices too small for rank 1 to be smaller, and the experts of a mixture of
    experts with the routers beside them. The input key of every part is its own name until `blocks.share_inputs`.
    """
    blocks = find_blocks(model)
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    targets: list[Target] = []
    notes: list[str] = []
    block_list = model.get_submodule(blocks)
    assert isinstance(block_list, nn.ModuleList)
    for index, block in enumerate(block_list):
        dense = _expert_parts(block)
        for name in sorted(dense):
            notes.append(f"{blocks}.{index}.{name}: experts or router, left dense")
        for name, module in block.named_modules():
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            full = f"{blocks}.{index}.{name}"
            out_features, in_features = features(module)
            if any(name == d or name.startswith(f"{d}.") for d in dense):
                continue
            if uses[id(module.weight)] > 1:
                notes.append(f"{full}: its weight is used twice (tied), left dense")
            elif out_features + in_features >= out_features * in_features:
                notes.append(f"{full}: {out_features} × {in_features} is too small to compress")
            else:
                part = Part(full, out_features, in_features, full, module.bias is not None)
                targets.append(Target(full, role_of(name), (index,), (part,)))
    ffns = [ffn for index in range(len(block_list)) for ffn in _ffns(f"{blocks}.{index}", targets)]
    return Structure(blocks, len(block_list), tuple(targets), tuple(notes), tuple(ffns))


def _ffns(block: str, targets: Sequence[Target]) -> Iterator[Target]:
    """The FFN of a block as a whole: the one matrix of role `down`, and before it those that make what it reads."""
    inside = [target for target in targets if target.name.startswith(f"{block}.")]
    readers = [target.parts[0] for target in inside if target.role == "down"]
    makers = [target.parts[0] for target in inside if target.role in ("gate", "up", "gate_up")]
    if len(readers) != 1 or not makers:
        return
    width = readers[0].in_features
    if sum(part.out_features for part in makers) not in (width, 2 * width):
        return
    parts = (*makers, readers[0])
    parents = [part.module.split(".")[:-1] for part in parts]
    common = [steps[0] for steps in zip(*parents, strict=False) if len(set(steps)) == 1]
    name = ".".join(common) if len(common) > len(block.split(".")) else f"{block}.ffn"
    yield Target(name, "ffn", inside[0].blocks, parts)


def _expert_parts(block: nn.Module) -> set[str]:
    """Names inside a block of experts (a list of modules or one 3-D parameter) and of linears beside them (routers)."""
    found = set()
    for name, module in block.named_modules():
        packed = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        if not (packed or (isinstance(module, nn.ModuleList) and len(module) > 1)):
            continue
        found.add(name)
        parent = block.get_submodule(name.rpartition(".")[0])
        prefix = f"{name.rpartition('.')[0]}." if "." in name else ""
        found |= {f"{prefix}{n}" for n, m in parent.named_children() if isinstance(m, (nn.Linear, Conv1D))}
    return found


def features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, however it stores its weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """A linear layer's stored weight as out × in."""
    return weight.T if isinstance(module, Conv1D) else weight
