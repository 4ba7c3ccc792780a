"""Finding blocks and targets by structure alone, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.model import targets
from spectrim.model.blocks import share_inputs
from tests.families import EXPERTS, FAMILIES, LAYERS, linears

DENSE_FAMILIES = [name for name in FAMILIES if name not in EXPERTS]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_block_has_the_targets_its_family_has(name: str) -> None:
    family = FAMILIES[name]
    structure = targets.find(family.make())
    assert structure.count == LAYERS
    for index in range(LAYERS):
        found = structure.of_block(index)
        assert sorted(target.role for target in found) == sorted(family.roles)
        assert all(target.name.startswith(f"{structure.block(index)}.") for target in found)
    assert len(structure.targets) == LAYERS * len(family.roles)


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_every_linear_of_the_blocks_is_a_target_and_nothing_else(name: str) -> None:
    model = FAMILIES[name].make()
    structure = targets.find(model)
    assert {target.name for target in structure.targets} == set(linears(model, structure.blocks))
    assert structure.notes == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_those_of_the_product(name: str) -> None:
    """out and in as the layer computes them, found by running it, not by reading its weight's shape."""
    family = FAMILIES[name]
    model = family.make()
    for target in targets.find(model).targets:
        (part,) = target.parts
        assert model.get_submodule(part.module)(torch.zeros(1, part.in_features)).shape == (1, part.out_features)
        if target.role in (family.out_in or {}):
            assert (part.out_features, part.in_features) == (family.out_in or {})[target.role]


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_that_read_one_tensor_have_one_key(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    structure = share_inputs(model, targets.find(model))
    for index in range(LAYERS):
        role = {target.name: target.role for target in structure.of_block(index)}
        key = {target.role: role[target.parts[0].input] for target in structure.of_block(index)}
        assert key == family.roles


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_and_routers_stay_dense_and_the_notes_say_so(name: str) -> None:
    structure = targets.find(FAMILIES[name].make())
    for index in range(LAYERS):
        for module in FAMILIES[name].dense:
            assert any(f"{structure.block(index)}.{module}: experts" in note for note in structure.notes)
    assert not any(".mlp." in target.name for target in structure.targets)


class _ListOfExperts(nn.Module):
    """A block with its experts in a ModuleList, as older code and remote code has them, and a linear router."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.mlp = nn.Module()
        self.mlp.router = nn.Linear(8, 4)
        self.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


class _Decoder(PreTrainedModel):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(PretrainedConfig())
        self.wte = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(blocks)
        # more modules, but fewer parameters than the blocks
        self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
        self.lm_head = nn.Linear(8, 64, bias=False)


def test_experts_in_a_list_and_the_router_beside_them_stay_dense() -> None:
    structure = targets.find(_Decoder([_ListOfExperts(), _ListOfExperts()]))
    assert [target.name for target in structure.targets] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert any(note.startswith("layers.1.mlp.router: ") for note in structure.notes)
    assert any(note.startswith("layers.1.mlp.experts: ") for note in structure.notes)


class _Block(nn.Module):
    def __init__(self, shared: nn.Linear | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.shared = nn.Linear(8, 8)
        if shared is not None:
            self.shared.weight = shared.weight
        self.narrow = nn.Linear(8, 1)


def test_tied_weights_and_matrices_too_small_are_left_and_noted() -> None:
    first = _Block()
    structure = targets.find(_Decoder([first, _Block(first.shared)]))
    assert [target.name for target in structure.targets] == ["layers.0.fc1", "layers.1.fc1"]
    notes = "\n".join(structure.notes)
    assert "layers.0.shared: its weight is used twice (tied)" in notes
    assert "layers.1.shared: its weight is used twice (tied)" in notes
    assert "layers.0.narrow: 1 × 8 is too small" in notes


def test_blocks_are_the_list_with_most_parameters_of_one_class() -> None:
    assert targets.find_blocks(_Decoder([_Block(), _Block()])) == "layers"
    with pytest.raises(ValueError, match="Linear has no list of equal decoder blocks"):
        targets.find_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("self_attn.q_proj", "q"),
        ("attn.c_proj", "o"),
        ("mlp.c_proj", "down"),
        ("attention.dense", "o"),
        ("mlp.dense_4h_to_h", "down"),
        ("fc2", "down"),
        ("mystery", "other"),
        ("q_proj.inner", "other"),
    ],
)
def test_the_longest_known_suffix_gives_the_role(name: str, role: str) -> None:
    assert targets.role_of(name) == role


def test_conv1d_is_turned_to_out_by_in() -> None:
    torch.manual_seed(0)
    layer, x = Conv1D(5, 3), torch.randn(2, 3)
    torch.nn.init.normal_(layer.weight)
    assert targets.features(layer) == (5, 3)
    assert torch.allclose(x @ targets.oriented(layer, layer.weight).T + layer.bias, layer(x))
    linear = nn.Linear(3, 5)
    assert targets.features(linear) == (5, 3)
    assert targets.oriented(linear, linear.weight) is linear.weight
