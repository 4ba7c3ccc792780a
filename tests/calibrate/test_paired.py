"""Two streams, block by block: what a step measures is what the whole models give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.calibrate.paired import ADDED, Paired, Step, steps_of
from spectrim.calibrate.states import InMemory
from spectrim.calibrate.statistics import Gram
from spectrim.core.plan import Target
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from spectrim.model.checkpoint import LiveModel
from spectrim.model.targets import Structure, oriented
from tests.families import FAMILIES, VOCABULARY

IDS = torch.randint(1, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))


class Changed(nn.Module):
    """A module whose outputs are a little off."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * self.inner(x) + 0.05  # type: ignore[no-any-return]


def paired(model: PreTrainedModel, residual: bool, batch: int = 4) -> tuple[Paired, Structure]:
    structure = share_inputs(model, targets.find(model))
    batches = [Batch(ids) for ids in IDS.split(batch)]
    return Paired(
        LiveModel(model), structure, batches, torch.device("cpu"), InMemory(), InMemory(), residual
    ), structure  # fmt: skip


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    yield
    for name, module in before.items():
        model.set_submodule(name, module)


@torch.no_grad()
def seen(model: PreTrainedModel, structure: Structure, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Inputs and outputs of every target, and what enters every block, of the whole model with modules in it."""
    found: dict[str, Tensor] = {}
    with swapped(model, modules):
        names = [part.module for target in structure.targets for part in target.parts]
        handles = []
        for name in names:

            def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                found[f"{name} in"], found[f"{name} out"] = args[0].flatten(0, -2), output.flatten(0, -2)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        for index in range(structure.count):

            def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                found[f"{index}"] = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2)

            block = model.get_submodule(structure.block(index))
            handles.append(block.register_forward_pre_hook(enters, with_kwargs=True))
        model(IDS, use_cache=False)
        for handle in handles:
            handle.remove()
    return found


def expected(
    model: PreTrainedModel, structure: Structure, target: Target, modules: Mapping[str, nn.Module], residual: bool
) -> Tensor:
    """Σ (t − W x′) x′ᵀ from whole passes: `modules` are those of the compressed stream until then."""
    dense, compressed = seen(model, structure, {}), seen(model, structure, modules)
    (part,) = target.parts
    wanted = dense[f"{part.module} out"]
    index = target.blocks[0]
    if residual and target.role in ADDED:
        before = [t.parts[0].module for t in structure.of_block(index) if t.role == "o" and target.role == "down"]
        for stream, sign in ((dense, 1), (compressed, -1)):
            wanted = wanted + sign * sum((stream[f"{name} out"] for name in before), stream[f"{index}"])
    inputs = compressed[f"{part.module} in"]
    return (wanted - model.get_submodule(part.module)(inputs)).double().T @ inputs.double()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
@torch.no_grad()
def test_a_step_measures_what_whole_models_give(name: str, residual: bool) -> None:
    model = FAMILIES[name].make()
    pair, structure = paired(model, residual)
    inside = [structure.of_block(index) for index in range(structure.count)]
    done: dict[str, nn.Module] = {}
    steps = 0
    for step in pair.steps(inside):
        steps += 1
        measured = step.measure({target: (Gram(),) for target in step.targets})
        for target in step.targets:
            (part,) = target.parts
            found = measured.of(part, oriented(module := model.get_submodule(part.module), module.weight))
            assert found.shape == (part.out_features, part.in_features) and found.dtype == torch.float64
            right = expected(model, structure, target, done, residual)
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
            x = seen(model, structure, done)[f"{part.module} in"].double()
            gram = measured.statistics.inputs[part.input][Gram()]
            torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))
        made = {target.name: Changed(model.get_submodule(target.name)) for target in step.targets}
        done |= made
        pair.installed |= made
    assert steps == sum(len(steps_of(of_block)) for of_block in inside) >= 4
    assert not any(isinstance(module, Changed) for module in model.modules()), "nothing stays swapped"


def everything(name: str, residual: bool, kept: int) -> tuple[dict[str, Tensor], int]:
    """All that a pass measures and the states that it ends with; how often matrices were multiplied."""
    model = FAMILIES[name].make()
    pair, structure = paired(model, residual)
    pair.kept = kept
    products: list[int] = []
    for target in structure.targets:
        model.get_submodule(target.name).register_forward_hook(lambda *_: products.append(1))
    found: dict[str, Tensor] = {}
    for step in pair.steps([structure.of_block(index) for index in range(structure.count)], through=True):
        measured = step.measure({target: (Gram(),) for target in step.targets})
        found |= {f"missed {key}": value for key, value in {**measured.missed, **measured.moved}.items()}
        found |= {f"gram {key}": of[Gram()] for key, of in measured.statistics.inputs.items()}
        pair.installed |= {target.name: Changed(model.get_submodule(target.name)) for target in step.targets}
    found |= {f"dense {i}": pair.dense.get(structure.count, i) for i in pair.own}
    found |= {f"compressed {i}": pair.compressed.get(structure.count, i) for i in pair.own}
    return found, len(products)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "falcon", "phi3"])
def test_what_is_kept_of_a_block_changes_no_bit(name: str, residual: bool) -> None:
    again, more = everything(name, residual, 0)
    kept, fewer = everything(name, residual, 2**20)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[key], kept[key]) for key in again)
    assert fewer < 0.75 * more


def test_what_there_is_no_room_for_is_run_again() -> None:
    again, more = everything("llama", True, 0)
    some, fewer = everything("llama", True, 2 * 4 * 16 * 32 * 4)  # the answers of one batch in both streams
    assert all(torch.equal(again[key], some[key]) for key in again)
    assert everything("llama", True, 2**20)[1] < fewer < more
    assert everything("llama", True, 1000)[1] >= more


def counted_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for every time that a block is run from now on."""
    from spectrim.model import blocks

    runs: list[int] = []
    run = blocks.run

    def counted(*args: Any) -> Tensor:
        runs.append(1)
        return run(*args)

    monkeypatch.setattr(blocks, "run", counted)
    return runs


def test_a_dense_stream_at_its_end_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = counted_runs(monkeypatch)
    model = FAMILIES["llama"].make()
    names = [target.name for target in targets.find(model).targets]

    def lost(dense: InMemory | None, changed: str) -> tuple[float, float, int]:
        pair, structure = paired(model, residual=False)
        runs.clear()  # of what found out which modules read one input
        if dense is not None:
            pair.dense, pair.ended = dense, bool(dense.held)
        for step in pair.steps([structure.of_block(index) for index in range(structure.count)], through=True):
            pair.installed |= {t.name: Changed(model.get_submodule(t.name)) for t in step.targets if t.name == changed}
        found = pair.lost()
        return found.kl, found.excess, len(runs)

    first, second, dense = lost(None, names[0]), lost(None, names[-1]), InMemory()
    assert first[0] != second[0] and lost(dense, names[0]) == first
    assert lost(dense, names[-1]) == (*second[:2], second[2] // 2), "one stream of two"


def test_steps_are_of_those_that_read_one_input() -> None:
    model = FAMILIES["llama"].make()
    structure = share_inputs(model, targets.find(model))
    roles = [[target.role for target in step] for step in steps_of(structure.of_block(0))]
    assert roles == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def test_how_many_sequences_run_at_once_changes_rounding_alone() -> None:
    found: list[dict[str, Tensor]] = []
    for batch in (1, 6):
        model = FAMILIES["llama"].make()
        pair, structure = paired(model, True, batch)
        inside = [structure.of_block(index) for index in range(structure.count)]
        steps = pair.steps(inside)
        measured = [step.measure({}) for step in steps]
        found.append({name: cross for each in measured for name, cross in {**each.missed, **each.moved}.items()})
        assert len(found[-1]) == 4 * structure.count, "one a step"
    for module, cross in found[0].items():
        torch.testing.assert_close(cross, found[1][module], rtol=1e-4, atol=1e-4)


def test_what_is_not_measured_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, structure = paired(FAMILIES["llama"].make(), residual=False)
    runs = counted_runs(monkeypatch)
    inside = [structure.of_block(index) for index in range(structure.count)]
    steps: list[Step] = list(pair.steps(inside))
    assert len(steps) == 8 and [step.last for step in steps] == [False, False, False, True] * 2
    assert len(runs) == 2 * 2, "both streams through the first block, two batches each"


def test_the_dense_stream_goes_on_with_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectrim.model import blocks

    pair, structure = paired(FAMILIES["llama"].make(), residual=False)
    whole: list[int] = []
    run = blocks.run

    def counted(*args: Any) -> Tensor:
        output = run(*args)
        whole.append(1)  # not where a hook has stopped it
        return output

    monkeypatch.setattr(blocks, "run", counted)
    inside = [structure.of_block(index) for index in range(structure.count)]
    for step in pair.steps(inside, through=True):
        step.measure({})
    assert len(whole) == 2 * 2 * structure.count, "once a stream, block and batch"
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        states = model(IDS[:4], output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.base_model.norm(pair.dense.get(structure.count, 0)), states[-1])


def test_blocks_that_do_not_add_up_are_refused_unless_told_not_to() -> None:
    pair, structure = paired(FAMILIES["gemma2"].make(), residual=True)
    inside = [structure.of_block(index) for index in range(structure.count)]
    with pytest.raises(
        ValueError, match=r"layers\.0: the outputs of o and down .* set calibrate\.residual_aware to fa"
    ):
        next(pair.steps(inside))
    pair, structure = paired(FAMILIES["gemma2"].make(), residual=False)
    assert len(list(pair.steps(inside))) == 8


def test_what_a_compressed_block_makes_infinite_is_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("nan")

    pair, structure = paired(FAMILIES["llama"].make(), residual=True)
    inside = [structure.of_block(index) for index in range(structure.count)]
    with pytest.raises(ValueError, match=r"layers\.0 as compressed so far gives values that are not finite on batch 0"):
        for step in pair.steps(inside):
            pair.installed |= {t.name: Broken() for t in step.targets if t.role == "o"}
