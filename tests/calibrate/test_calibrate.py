"""Both drivers against a whole-model run written by hand, and how much the streamed one holds at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.resident import resident
from spectrim.calibrate.statistics import Cosine, FisherColumns, Gram, Norm, Statistic, SublayerCosine
from spectrim.calibrate.streamed import streamed
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from spectrim.model.checkpoint import Checkpoint, LiveModel
from spectrim.model.targets import Structure
from tests.families import FAMILIES, LAYERS, VOCABULARY, linears

CPU = torch.device("cpu")
LENGTH = 24
Measured = dict[int, BlockStatistics]


def token_ids(count: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor | None:
    """Which tokens of five windows are real; some windows are whole, so that batches with and without pads mix."""
    if side == "none":
        return None
    mask = torch.ones(5, LENGTH, dtype=torch.bool)
    for row, pads in ((0, 7), (1, 3), (4, 15)):
        mask[row, -pads:] = False
    return mask if side == "right" else mask.flip(1)


def batches_of(ids: Tensor, mask: Tensor | None, size: int = 2) -> list[Batch]:
    masks = [None] * len(ids.split(size)) if mask is None else list(mask.split(size))
    return [Batch(*pair) for pair in zip(ids.split(size), masks, strict=True)]


def structure_of(model: PreTrainedModel) -> Structure:
    return share_inputs(model, targets.find(model))


def wanting(structure: Structure, each: tuple[Statistic, ...], block: tuple[Statistic, ...]) -> dict[int, Wanted]:
    return {i: Wanted(dict.fromkeys(structure.of_block(i), each), block) for i in range(structure.count)}


@contextmanager
def watched(
    model: PreTrainedModel, structure: Structure
) -> Iterator[tuple[dict[str, Tensor], dict[int, list[Tensor]]]]:
    """The inputs of every linear and the states before and after every block, of the last forward pass."""
    inputs: dict[str, Tensor] = {}
    states: dict[int, list[Tensor]] = {}
    handles = []

    def keep_input(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0].detach()

        return hook

    def keep_states(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            states[index] = [before.detach(), (output[0] if isinstance(output, tuple) else output).detach()]

        return hook

    for name, module in linears(model, structure.blocks).items():
        handles.append(module.register_forward_pre_hook(keep_input(name)))
    for index in range(structure.count):
        block = model.get_submodule(structure.block(index))
        handles.append(block.register_forward_hook(keep_states(index), with_kwargs=True))
    yield inputs, states
    for handle in handles:
        handle.remove()


def by_hand(model: PreTrainedModel, structure: Structure, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Σ x xᵀ and Σ |x| for the input of each linear, and the mean cosine over each block; real tokens alone."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    with torch.no_grad(), watched(model, structure) as (inputs, states):
        model(ids, attention_mask=None if mask is None else mask.long(), use_cache=False)
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        rows = value.reshape(*ids.shape, -1)[real].double()
        found[name] = (rows.T @ rows, rows.abs().sum(0))
    for index, (before, after) in states.items():
        x, y = before[real].double(), after[real].double()
        found[f"block {index}"] = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
    return found


def assert_same(measured: Measured, expected: dict[str, Any], structure: Structure) -> None:
    assert list(measured) == list(range(structure.count))
    for index, block in measured.items():
        for target in structure.of_block(index):
            of_target = block.of(target)[target.name]
            gram, total = expected[target.name]
            scale = float(gram.abs().max())
            torch.testing.assert_close(of_target[Gram()], gram, rtol=1e-5, atol=1e-6 * scale)
            torch.testing.assert_close(of_target[Norm(1)], total, rtol=1e-5, atol=0)
        torch.testing.assert_close(block.block[Cosine()], expected[f"block {index}"].reshape(1), rtol=1e-5, atol=0)


def run_streamed(
    model: PreTrainedModel | Checkpoint, structure: Structure, wanted: dict[int, Wanted], batches: list[Batch]
) -> Measured:
    source = model if isinstance(model, Checkpoint) else LiveModel(model)
    return dict(streamed(source, structure, batches, wanted, CPU))


Built = tuple[PreTrainedModel, Path, Structure]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """A family's model, in memory and on disk, and its structure; made once, and only read."""

    @functools.cache
    def build(name: str) -> Built:
        model = FAMILIES[name].make()
        directory = tmp_path_factory.mktemp("families") / name
        model.save_pretrained(directory)
        return model, directory, structure_of(model)

    return build


def assert_identical(one: Measured, other: Measured) -> None:
    assert list(one) == list(other)
    for index in one:
        assert one[index].inputs.keys() == other[index].inputs.keys()
        for key, values in one[index].inputs.items():
            for statistic, value in values.items():
                torch.testing.assert_close(value, other[index].inputs[key][statistic], rtol=0, atol=0)
        assert one[index].block.keys() == other[index].block.keys()
        for statistic, value in one[index].block.items():
            torch.testing.assert_close(value, other[index].block[statistic], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_from_disk_resident_and_by_hand_agree(name: str, side: str, built: Callable[[str], Built]) -> None:
    model, directory, structure = built(name)
    ids, mask = token_ids(), padding(side)
    wanted = wanting(structure, (Gram(), Norm(1)), (Cosine(),))
    from_disk = run_streamed(Checkpoint(directory), structure, wanted, batches_of(ids, mask))
    in_memory = dict(resident(model, structure, batches_of(ids, mask), wanted))
    assert_identical(from_disk, in_memory)
    if side == "none":
        assert_identical(from_disk, run_streamed(model, structure, wanted, batches_of(ids, mask)))
    assert_same(from_disk, by_hand(model, structure, ids, mask), structure)


@pytest.mark.parametrize("name", FAMILIES)
def test_pads_on_the_right_count_for_nothing(name: str, built: Callable[[str], Built]) -> None:
    """A padded batch gives what its sequences give one by one, cut to their real tokens."""
    model, _, structure = built(name)
    ids, mask = token_ids(), padding("right")
    assert mask is not None
    wanted = wanting(structure, (Gram(), Norm(1)), (Cosine(),))
    padded = run_streamed(model, structure, wanted, batches_of(ids, mask))
    assert_same(padded, by_hand(model, structure, ids, mask), structure)
    alone = [Batch(ids[i : i + 1, : int(mask[i].sum())]) for i in range(len(ids))]
    single = run_streamed(model, structure, wanted, alone)
    for index in padded:
        for key, values in padded[index].inputs.items():
            for statistic, value in values.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(value, single[index].inputs[key][statistic], rtol=1e-5, atol=1e-6 * scale)
        torch.testing.assert_close(padded[index].block, single[index].block, rtol=1e-6, atol=0)


def test_parts_with_one_input_share_one_statistic() -> None:
    model = FAMILIES["llama"].make()
    structure = structure_of(model)
    wanted = {0: Wanted({target: (Gram(),) for target in structure.of_block(0)})}
    (block,) = dict(resident(model, structure, batches_of(token_ids(), None), wanted)).values()
    by_role = {target.role: block.of(target)[target.name][Gram()] for target in structure.of_block(0)}
    assert by_role["q"] is by_role["k"] is by_role["v"]
    assert by_role["gate"] is by_role["up"]
    assert len({id(gram) for gram in by_role.values()}) == 4


def alive(model: PreTrainedModel, structure: Structure) -> list[int]:
    """The blocks of which any parameter holds values."""
    return [
        index
        for index in range(structure.count)
        if any(not p.is_meta for p in model.get_submodule(structure.block(index)).parameters())
    ]


def test_one_block_is_alive_at_a_time_and_the_embedding_goes_before(tmp_path: Path) -> None:
    FAMILIES["gemma2"].make(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    ).save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    structure = structure_of(source.model)
    batches = batches_of(token_ids(), None)
    seen: list[tuple[list[int], bool]] = []
    embedding = source.model.get_input_embeddings

    def look(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("calibrate", 4 * len(batches))
        seen.append((alive(source.model, structure), embedding().get_parameter("weight").is_meta))

    wanted = wanting(structure, (Gram(),), ())
    for index, _ in streamed(source, structure, batches, wanted, CPU, look):
        assert alive(source.model, structure) == [index]
    assert seen == [([index], True) for index in range(4) for _ in batches]
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_blocks_after_the_last_wanted_one_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].make()
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    structure = structure_of(source.model)
    wanted = {0: Wanted({}, (Cosine(),)), 1: Wanted()}
    loaded: list[str] = []
    original = source.load

    def load(prefix: str, device: torch.device) -> None:
        loaded.append(prefix)
        original(prefix, device)

    monkeypatch.setattr(source, "load", load)
    assert list(dict(streamed(source, structure, batches_of(token_ids(), None), wanted, CPU))) == [0]
    assert loaded == [structure.block(0)]
    assert dict(streamed(source, structure, [], {0: Wanted()}, CPU)) == {}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "phi3"])
def test_fisher_columns_are_squared_gradients_of_each_sequence_alone(name: str, side: str) -> None:
    model = FAMILIES[name].make()
    structure = structure_of(model)
    ids, mask = token_ids(3), padding(side)
    mask = None if mask is None else mask[:3]
    wanted = wanting(structure, (FisherColumns(), Gram()), ())
    measured = dict(resident(model, structure, batches_of(ids, mask), wanted))
    weights = {t.name: model.get_parameter(f"{t.name}.weight") for t in structure.targets}
    expected = {t.name: torch.zeros(t.parts[0].in_features, dtype=torch.float64) for t in structure.targets}
    for row in range(len(ids)):
        real = torch.ones(LENGTH, dtype=torch.bool) if mask is None else mask[row]
        options = {} if mask is None else {"attention_mask": mask[row : row + 1].long()}
        logits = model(ids[row : row + 1], use_cache=False, **options).logits[0][real]
        # the sequence is its real tokens: as many predictions as there are neighbours among them
        loss = -logits[:-1].log_softmax(-1).gather(1, ids[row][real][1:, None]).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for target, gradient in zip(structure.targets, gradients, strict=True):
            oriented = gradient.T if name == "gpt2" else gradient
            expected[target.name] += oriented.double().square().sum(0)
    for index, block in measured.items():
        for target in structure.of_block(index):
            found = block.of(target)[target.name]
            torch.testing.assert_close(found[FisherColumns()], expected[target.name], rtol=1e-4, atol=1e-12)
            assert found[Gram()].shape == (target.parts[0].in_features,) * 2


def test_the_resident_driver_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["gpt2"].make()
    structure = structure_of(model)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    weight.grad = old = torch.full_like(weight, 7)
    wanted = wanting(structure, (FisherColumns(),), (Cosine(),))
    trained = dict(resident(model, structure, batches_of(token_ids(), None), wanted))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert weight.grad is old and bool((old == 7).all())
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # neither dropout nor the gradient that was there has a part in it
    again = dict(resident(FAMILIES["gpt2"].make(), structure, batches_of(token_ids(), None), wanted))
    for index in trained:
        torch.testing.assert_close(trained[index].gradients, again[index].gradients, rtol=0, atol=0)


def test_dropout_is_off_while_a_live_model_is_streamed() -> None:
    model = FAMILIES["gpt2"].make()
    structure = structure_of(model)
    wanted = wanting(structure, (Gram(),), (Cosine(),))
    expected = run_streamed(model, structure, wanted, batches_of(token_ids(), None))
    model.train()
    assert_identical(run_streamed(model, structure, wanted, batches_of(token_ids(), None)), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "bloom", "mistral"])
def test_sublayer_cosines_are_those_of_the_states_around_each_norm(name: str) -> None:
    """The state between attention and FFN is what the second norm reads: found by its name, family by family."""
    norms = {"gpt2": "ln_2", "opt": "final_layer_norm"}
    model = FAMILIES[name].make()
    structure = structure_of(model)
    ids = token_ids()
    between: list[Tensor] = []
    norm = model.get_submodule(f"{structure.block(1)}.{norms.get(name, 'post_attention_layernorm')}")
    handle = norm.register_forward_pre_hook(lambda _, args: between.append(args[0].detach()))
    with torch.no_grad(), watched(model, structure) as (_, states):
        model(ids, use_cache=False)
    handle.remove()
    before, after = (state.flatten(0, 1).double() for state in states[1])
    middle = between[0].reshape(before.shape).double()
    expected = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in ((before, middle), (middle, after))]
    wanted = wanting(structure, (), (SublayerCosine(), Cosine()))
    measured = run_streamed(model, structure, wanted, batches_of(ids, None))
    torch.testing.assert_close(measured[1].block[SublayerCosine()], torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "falcon", "falcon_new", "gpt_neox"])
def test_sublayer_cosines_of_blocks_without_a_state_between_are_an_error(name: str) -> None:
    model = FAMILIES[name].make()
    structure = structure_of(model)
    with pytest.raises(ValueError, match=r"\.0: .*sub-layer statistics are not defined for post-norm or parallel"):
        run_streamed(model, structure, wanting(structure, (), (SublayerCosine(),)), batches_of(token_ids(), None))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sublayers_that_cannot_be_told_are_an_error() -> None:
    model = FAMILIES["mixtral"].make()
    structure = structure_of(model)
    with pytest.raises(ValueError, match="has 0 targets of role down: its sub-layers are not known"):
        run_streamed(model, structure, wanting(structure, (), (SublayerCosine(),)), batches_of(token_ids(), None))


def test_values_that_are_not_finite_stop_calibration_and_say_where() -> None:
    model = FAMILIES["llama"].make()
    structure = structure_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    wanted = wanting(structure, (Gram(), FisherColumns()), ())
    with pytest.raises(ValueError, match=r"model\.layers\.1 gives values that are not finite on batch 0"):
        run_streamed(model, structure, wanted, batches_of(token_ids(), None))
    with pytest.raises(ValueError, match="the loss of calibration sequence 0 is not finite"):
        dict(resident(model, structure, batches_of(token_ids(), None), wanted))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_progress_counts_to_its_total() -> None:
    model = FAMILIES["llama"].make()
    structure = structure_of(model)
    seen: list[tuple[str, int, int]] = []
    wanted = wanting(structure, (FisherColumns(),), ())
    dict(resident(model, structure, batches_of(token_ids(), None), wanted, lambda *done: seen.append(done)))
    assert seen == [("calibrate", i, 5) for i in range(1, 6)]
    seen.clear()
    wanted = wanting(structure, (Gram(),), ())
    dict(
        streamed(
            LiveModel(model), structure, batches_of(token_ids(), None), wanted, CPU, lambda *done: seen.append(done)
        )
    )
    assert seen == [("calibrate", i, 3 * LAYERS) for i in range(1, 3 * LAYERS + 1)]
