"""Replaying blocks one by one equals the whole forward pass, and recording leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from spectrim.model import blocks, targets
from spectrim.model.blocks import Batch, Call
from tests.families import FAMILIES, VOCABULARY

LENGTH = 24


def last_state(model: PreTrainedModel, last: nn.Module, batch: Batch) -> Tensor:
    """The output of the last block in a whole forward pass."""
    kept: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: object) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    handle = last.register_forward_hook(hook)
    with torch.no_grad():
        model(batch.ids, attention_mask=None if batch.mask is None else batch.mask.long(), use_cache=False)
    handle.remove()
    return kept[0]


def windows(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def masks() -> dict[str, Tensor | None]:
    left, right = torch.ones(3, LENGTH, dtype=torch.bool), torch.ones(3, LENGTH, dtype=torch.bool)
    left[0, :5] = left[1, :11] = False
    right[1, 9:] = right[2, 20:] = False
    return {"none": None, "left": left, "right": right}


@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_replayed_equal_the_whole_model(name: str, mask: str) -> None:
    model = FAMILIES[name].make()
    structure = targets.find(model)
    batch = Batch(windows(), masks()[mask])
    originals = list(model.get_submodule(structure.blocks).children())
    state, calls = blocks.record(model, structure, batch)
    assert list(model.get_submodule(structure.blocks).children()) == originals
    with torch.no_grad():
        for block, call in zip(originals, calls, strict=True):
            state = blocks.run(block, state, call)
    torch.testing.assert_close(state, last_state(model, originals[-1], batch), rtol=0, atol=0)


def test_neighbours_get_their_own_masks() -> None:
    model = FAMILIES["gemma2"].make()
    _, calls = blocks.record(model, targets.find(model), Batch(windows()))
    first, second = (call.kwargs["attention_mask"] for call in calls)
    # the window is 8: the last token sees 8 tokens in the first block, all 24 in the second
    seen = [
        LENGTH if mask is None else int((mask if mask.dtype == torch.bool else mask == 0)[0, 0, -1].sum())
        for mask in (first, second)
    ]
    assert seen == [8, LENGTH]


def test_equal_tensors_of_two_calls_are_held_once() -> None:
    a = [Call((torch.arange(3),), {"mask": torch.ones(2), "other": torch.zeros(2), "flag": True})]
    b = [Call((torch.arange(3),), {"mask": torch.ones(2), "other": torch.ones(2), "flag": False})]
    assert blocks.deduplicated(a, None) is a
    (shared,) = blocks.deduplicated(b, a)
    assert shared.args[0] is a[0].args[0]
    assert shared.kwargs["mask"] is a[0].kwargs["mask"]
    assert shared.kwargs["other"] is b[0].kwargs["other"]
    assert shared.kwargs["flag"] is False
    (different,) = blocks.deduplicated([Call((), {"mask": torch.ones(2)})], a)
    assert different.kwargs["mask"] is not a[0].kwargs["mask"]


@pytest.mark.parametrize("family, kinds", [("llama", 1), ("gemma2", 2)])
def test_blocks_that_are_called_alike_share_one_call_in_every_batch(family: str, kinds: int) -> None:
    model = FAMILIES[family].make()
    structure = targets.find(model)
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = (blocks.record(model, structure, Batch(batch[None]))[1] for batch in ids)
    assert structure.count == 2 and len({id(call) for call in first}) == kinds
    assert len({id(call) for call in blocks.deduplicated(second, first)}) == kinds


class _Twice(PreTrainedModel):
    """Calls only the first of its blocks."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        return self.layers[0](torch.zeros(1, 4))[0]


def test_a_model_that_is_no_plain_decoder_is_refused_and_left_as_it_was() -> None:
    model = _Twice()
    structure = targets.Structure("layers", 2, (), ())
    with pytest.raises(ValueError, match="_Twice called 1 of its 2 blocks in one pass"):
        blocks.record(model, structure, Batch(torch.zeros(1, 4, dtype=torch.int64)))
    assert all(isinstance(block, nn.Linear) for block in model.layers)


@pytest.mark.parametrize("name", ["llama", "falcon", "qwen3_moe"])
def test_sharing_inputs_touches_neither_the_model_nor_its_configuration(name: str) -> None:
    model = FAMILIES[name].make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_json_string()
    blocks.share_inputs(model, targets.find(model))
    assert model.config.to_json_string() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
