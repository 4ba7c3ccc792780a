"""`--device cuda`: on a simulated GPU, which refuses to mix places, and on a real one (`-m gpu`, with one visible)."""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

import spectrim
from spectrim.calibrate.collect import Wanted
from spectrim.calibrate.statistics import Gram
from spectrim.calibrate.streamed import streamed
from spectrim.core import distributed, eigen, linalg
from spectrim.model import targets
from spectrim.model.blocks import Batch, share_inputs
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.prefetch import Ahead, pinned
from tests import simulated
from tests.conftest import save_model, tree_hash
from tests.families import FAMILIES, VOCABULARY
from tests.simulated import CPU, CUDA, OnGPU

CALIBRATION = torch.randint(1, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(2))
SEQUENTIAL = ("calibrate.sequential=true",)
BATCH = "calibrate.batch=2"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2", "gemma2"):
        save_model(FAMILIES[name].make(), folder / name)
    return folder


def compressed(model: Path, out: Path, recipe: str, device: str, *settings: str, **more: Any) -> Path:
    options: dict[str, Any] = {"settings": [BATCH, *settings], **more}
    spectrim.compress(model, recipe, 0.3, CALIBRATION, out, device=device, **options)
    return out


RUNS = [
    ("llama", "whitened", ()), ("llama", "unirank", ()), ("llama", "svd", ()), ("llama", "whitened", SEQUENTIAL),
    ("gpt2", "asvd", ()), ("gemma2", "whitened", ()), ("llama", "lorap", ()), ("llama", "input-weighted", ()),
]  # fmt: skip

DUO = ("llama", "duo-svd", ("groups.0.allocate.sequences=4",))


@pytest.mark.parametrize(("model", "recipe", "settings"), [*RUNS, DUO])
def test_a_run_keeps_all_that_meets_in_one_place(
    model: str, recipe: str, settings: tuple[str, ...], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the simulated GPU, which computes what the CPU does: the same weights, bit for bit."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = compressed(models / model, tmp_path / "cpu", recipe, "cpu", *settings)
    with monkeypatch.context() as patch, simulated.gpu(patch):
        found = compressed(models / model, tmp_path / "cuda", recipe, "cuda:0", *settings)
    run = json.loads((found / "run.json").read_text(encoding="utf-8"))
    assert run["hardware"]["device"] == "simulated"
    assert tree_hash(found, "run.json", "spectrim.json") == tree_hash(expected, "run.json", "spectrim.json")
    assert counts(found) == counts(expected)


def grams(source: Checkpoint, device: torch.device) -> list[Tensor]:
    """Of all inputs, block by block."""
    structure = share_inputs(source.model, targets.find(source.model))
    wanted = {i: Wanted(dict.fromkeys(structure.of_block(i), (Gram(),))) for i in range(structure.count)}
    batches = [Batch(ids) for ids in CALIBRATION.split(3)]
    found = streamed(source, structure, batches, wanted, device)
    return [of_key[Gram()].cpu() for _, block in found for of_key in block.inputs.values()]


def gpt_neo() -> PreTrainedModel:
    """A model each of whose blocks has a table, which masks what a token does not see."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    kinds = [[["global", "local"], 1]]
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    more: dict[str, Any] = {"max_position_embeddings": 64, "window_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, **sizes, **more)).eval()


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "opt", "bloom", "falcon", "gemma3", "phi3"])
def test_tables_go_where_the_weights_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gpt_neo() if name == "gpt_neo" else FAMILIES[name].make()).save_pretrained(tmp_path)
    with sdpa_kernel(SDPBackend.MATH):
        expected = grams(Checkpoint(tmp_path), CPU)
    with simulated.gpu(monkeypatch):
        source = Checkpoint(tmp_path)
        found = grams(source, CUDA)
        blocks = source.model.get_submodule(targets.find(source.model).blocks)
        assert not any(buffer.is_cuda for buffer in blocks.buffers()), "gone with their block"
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_simulation_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.ones(2, 2)
    with simulated.gpu(monkeypatch):
        there = here.to(CUDA)
        assert isinstance(there, OnGPU) and there.is_cuda and there.device == CUDA
        assert (there @ there).is_cuda and not there.cpu().is_cuda and (there * 2).sum().item() == 8
        for meeting in (lambda: here @ there, lambda: there + here, lambda: torch.cat([here, there])):
            with pytest.raises(RuntimeError, match="tensors on cuda:0 and of shape"):
                meeting()
        assert torch.zeros(3, device=CUDA).is_cuda and there.new_zeros(3).is_cuda


# --- the next block, read ahead ---


def test_blocks_are_read_ahead_by_a_thread_and_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, bool]] = []
    original = Checkpoint._tensor

    def noted(self: Checkpoint, key: str) -> Tensor:
        read.append((key, threading.current_thread().name.startswith("spectrim-prefetch")))
        return original(self, key)

    monkeypatch.setattr(Checkpoint, "_tensor", noted)
    norms = "input_layernorm.weight"  # which nothing but the block itself reads
    with simulated.gpu(monkeypatch):
        compressed(models / "llama", tmp_path / "cuda", "whitened", "cuda:0")
    of_norms = [(key.split(".")[2], ahead) for key, ahead in read if key.endswith(norms)][:2]
    assert of_norms == [("0", False), ("1", True)]
    assert sum(key.endswith(f"0.{norms}") for key, _ in read) == 2, "for the block, and to be written"


def test_nothing_is_read_ahead_for_a_cpu(models: Path) -> None:
    source = Checkpoint(models / "llama")
    prefix = targets.find(source.model).block(1)
    source.prefetch(prefix, CPU)
    assert source._ahead.take(source._inside(prefix)) is None


def test_what_was_begun_is_taken_once_and_nothing_else() -> None:
    read: list[str] = []

    def reading(key: str) -> Tensor:
        read.append(key)
        if key == "bad":
            raise ValueError("cannot be read")
        return torch.tensor([len(key)])

    ahead = Ahead(reading)
    assert ahead.take(["a"]) is None
    ahead.begin(["a", "bc"])
    found = ahead.take(["a", "bc"])
    assert found is not None and {key: int(t) for key, t in found.items()} == {"a": 1, "bc": 2} and read == ["a", "bc"]
    assert ahead.take(["a", "bc"]) is None, "it is not held any longer"
    ahead.begin(["a"])
    assert ahead.take(["other"]) is None and ahead.take(["a"]) is None
    ahead.begin(["bad"])
    with pytest.raises(ValueError, match="cannot be read"):
        ahead.take(["bad"])


def test_memory_that_cannot_be_pinned_is_said_and_not_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Tensor) -> Tensor:
        raise RuntimeError("out of page-locked memory\nat some place")

    monkeypatch.setattr(Tensor, "pin_memory", refused)
    tensor = torch.ones(3)
    assert pinned(tensor) is tensor
    assert "copied more slowly: out of page-locked memory" in caplog.text and "at some place" not in caplog.text


# --- eigenvectors ---


def symmetric(size: int = 12) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("how", ["fast", "slow", "fails", "not finite"])
def test_eigenvectors_come_from_where_they_are_fast_and_right(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer of the GPU that is wrong never goes on, and what comes back is on the GPU again."""
    matrix, places = symmetric(), []
    for name in ("eigh", "eigvalsh"):
        original = getattr(torch.linalg, name)

        def solving(given: Tensor, original: Any = original) -> Any:
            places.append(given.device.type)
            if given.is_cuda and how == "fails":
                raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED\nat some place")
            found = original(given)
            if given.is_cuda and how == "not finite":
                return [t * torch.nan for t in found] if isinstance(found, tuple) else found * torch.nan
            return found

        monkeypatch.setattr(torch.linalg, name, solving)
    energies, vectors = eigen.eigh(matrix)
    assert places == ["cpu"] and caplog.text == ""
    with simulated.gpu(monkeypatch), caplog.at_level(logging.WARNING):
        if how == "slow":
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
        found, turned = eigen.eigh(matrix.to(CUDA))
        alone = eigen.eigvalsh(matrix.to(CUDA))
        assert found.is_cuda and turned.is_cuda and alone.is_cuda
        torch.testing.assert_close(found.cpu(), energies)
        torch.testing.assert_close(turned.cpu(), vectors)
        torch.testing.assert_close(alone.cpu(), energies)
    tried = {"fast": ["cuda"], "slow": ["cpu"]}.get(how, ["cuda", "cpu"])
    assert places[1:] == [*tried, *tried]
    assert ("go to the CPU" in caplog.text) == (how in ("fails", "not finite")) and "at some place" not in caplog.text


def test_nothing_else_asks_a_solver_of_its_own_choice() -> None:
    source = Path(spectrim.__file__).parent
    callers = [path.name for path in source.rglob("*.py") if re.search(r"linalg\.eig\w+\(", path.read_text("utf-8"))]
    assert callers == ["eigen.py"]


def test_an_error_of_the_cpu_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = torch.full((3, 3), torch.nan, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        eigen.eigh(bad)
    with simulated.gpu(monkeypatch), pytest.raises(torch.linalg.LinAlgError):
        eigen.eigh(bad.to(CUDA))


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_factorisations_stay_on_the_gpu(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a metric comes from a file, so from main memory."""
    weight, gram = torch.randn(shape, generator=torch.Generator().manual_seed(1)), symmetric(shape[1])
    output = symmetric(shape[0])
    expected, both = linalg.directions(weight, gram), linalg.two_sided(weight, gram, output)
    with simulated.gpu(monkeypatch):
        for metric in (gram, gram.to(CUDA)):
            found = linalg.directions(weight.to(CUDA), metric)
            assert all(t.is_cuda for t in found)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.cpu(), other)
            for one, other in zip(linalg.two_sided(weight.to(CUDA), metric, output), both, strict=True):
                torch.testing.assert_close(one.cpu(), other)


# --- several processes ---


@pytest.mark.parametrize(("given", "number", "taken"), [("cuda", "1", 1), ("cuda:0", "1", 0), ("cuda", None, None)])
def test_each_process_takes_the_gpu_of_its_number(
    given: str, number: str | None, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a number, as other starters leave it, that which it sees first."""
    started: list[Any] = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if number is not None:
        monkeypatch.setenv("LOCAL_RANK", number)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: started.append(backend))
    assert distributed.join(torch.device(given))
    chosen = [] if taken is None else [torch.device("cuda", taken)]
    assert started == [*chosen, "cpu:gloo,cuda:nccl"]
    monkeypatch.setattr(distributed, "together", lambda: True)
    assert distributed.own(torch.device(given)) == (torch.device(given) if taken is None else chosen[0])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "together", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU of its own, 1 are seen"):
        distributed.own(torch.device("cuda"))


def test_a_live_model_is_run_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match="the model is on cpu, the run on cuda: give device='cpu'"):
        spectrim.compress(model, "whitened", 0.3, CALIBRATION, device="cuda")


# --- a real GPU: CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/test_device.py ---


def counts(out: Path) -> dict[str, dict[str, int]]:
    choices = json.loads((out / "spectrim.json").read_text(encoding="utf-8"))["plan"]["choices"]
    return {name: choice["counts"] for name, choice in choices.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "recipe", "settings"), [*RUNS, ("llama", "duo-svd", ("groups.0.allocate.sequences=4",))]
)
def test_plans_of_cpu_and_gpu_agree(
    model: str, recipe: str, settings: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    """To within one unit a target, of each kind; a matrix dense in one is so in the other, or would be by one unit."""
    one, two = (compressed(models / model, tmp_path / on, recipe, on, *settings) for on in ("cpu", "cuda"))
    expected, found = counts(one), counts(two)
    assert expected.keys() == found.keys() and expected
    for name, of_kind in expected.items():
        assert of_kind.keys() == found[name].keys()
        assert all(abs(count - found[name][kind]) <= 1 for kind, count in of_kind.items()), (name, of_kind, found[name])


@pytest.mark.gpu
def test_a_limit_on_memory_and_a_killed_run_on_a_gpu(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states in files, the next block read ahead into pinned memory, the same bytes after a restart."""
    whole = compressed(models / "llama", tmp_path / "whole", "whitened", "cuda", memory="100MB")
    original, read = linalg.directions, 0

    def stopped(*arguments: Any) -> Any:
        nonlocal read
        read += 1
        if read == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("spectrim.methods.svd.directions", stopped)
        compressed(models / "llama", tmp_path / "out", "whitened", "cuda", memory="100MB")
    compressed(models / "llama", tmp_path / "out", "whitened", "cuda", memory="100MB")
    for file in whole.glob("*.safetensors"):
        again = load_file(tmp_path / "out" / file.name)
        assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(file).items())
