"""Whole runs on text that the model writes itself: alone and mixed, kept, in two processes, and where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spectrim
from spectrim import owntext
from spectrim.calibrate.sampling import sample
from spectrim.data.text import SELF, Source, parse_source, sample_windows
from spectrim.measure.evaluate import evaluate
from tests.conftest import letters, make_tokenizer, save_model, tree_hash
from tests.families import FAMILIES
from tests.processes import compressed_together

SIZES: dict[str, Any] = {"sequences": 8, "length": 24}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was written, call by call."""
    found: list[Tensor] = []

    def noting(*given: Any) -> Tensor:
        found.append(sample(*given))
        return found[-1]

    monkeypatch.setattr(owntext, "sample", noting)
    return found


def windows_of(work: Path) -> Tensor:
    (file,) = (work / "windows").glob("*.safetensors")
    return load_file(file)["ids"]


def test_alone_it_needs_no_tokenizer_and_is_drawn_once(
    llama_dir: Path, tmp_path: Path, drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(llama_dir, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    work = tmp_path / "work"
    for i, ratio in enumerate((0.3, 0.4)):
        spectrim.compress(bare, "whitened", ratio, SELF, tmp_path / f"{i}", work=work, **SIZES)
    assert len(drawn) == 1
    windows = windows_of(work)
    assert windows.shape == (8, 24) and set(map(tuple, windows.tolist())) == set(map(tuple, drawn[0].tolist()))
    spectrim.compress(bare, "whitened", 0.3, SELF, tmp_path / "seed", work=work, seed=1, **SIZES)
    monkeypatch.setattr("spectrim.calibrate.sampling.CACHE", 1)
    settings = ["calibrate.batch=3"]
    spectrim.compress(bare, "whitened", 0.3, SELF, tmp_path / "batch", work=work, settings=settings, **SIZES)
    assert len(drawn) == 3, "another seed, and windows drawn in other batches, may be others"
    assert not torch.equal(drawn[0], drawn[1])


def test_another_model_writes_its_own(tmp_path: Path, drawn: list[Tensor]) -> None:
    for seed in (0, 1):
        model = save_model(FAMILIES["llama"].make(seed), tmp_path / f"model{seed}")
        spectrim.compress(model, "whitened", 0.3, SELF, tmp_path / f"{seed}", work=tmp_path / "work", **SIZES)
    assert len(drawn) == 2 and not torch.equal(*drawn)


def test_mixed_with_a_file_by_weight(llama_dir: Path, text_file: Path, tmp_path: Path, drawn: list[Tensor]) -> None:
    text = [f"{text_file}=3", "self=1"]
    spectrim.compress(llama_dir, "whitened", 0.3, text, tmp_path / "out", **SIZES)
    rows = set(map(tuple, windows_of(tmp_path / "out.work").tolist()))
    assert len(drawn) == 1 and len(drawn[0]) == 2 and len(rows & set(map(tuple, drawn[0].tolist()))) == 2


def test_the_same_command_gives_the_same_bytes(llama_dir: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        spectrim.compress(llama_dir, "unirank", 0.3, [str(text_file), SELF], tmp_path / name, **SIZES)
    assert tree_hash(tmp_path / "one", "run.json") == tree_hash(tmp_path / "two", "run.json")


def test_a_live_model_writes_for_itself(tmp_path: Path, drawn: list[Tensor]) -> None:
    model = FAMILIES["llama"].make()
    before = [p.requires_grad for p in model.parameters()]
    assert spectrim.compress(model, "whitened", 0.3, SELF, **SIZES).model is model
    assert len(drawn) == 1 and len(before) > 0
    with pytest.raises(ValueError, match="give the tokenizer too"):
        spectrim.compress(FAMILIES["llama"].make(), "whitened", 0.3, [SELF, str(tmp_path / "text.txt")], **SIZES)


def test_nothing_is_written_where_nothing_is_measured(llama_dir: Path, tmp_path: Path, drawn: list[Tensor]) -> None:
    spectrim.compress(llama_dir, "svd", 0.3, SELF, tmp_path / "out", **SIZES)
    assert drawn == []


@pytest.mark.slow
@pytest.mark.distributed
def test_in_two_processes_the_first_one_writes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = save_model(FAMILIES["qwen3"].make(), tmp_path / "dense")
    save_file({"ids": torch.zeros(1, 2, dtype=torch.int64)}, tmp_path / "windows.safetensors")
    given: dict[str, Any] = {"ratio": 0.3, "settings": ["calibrate.batch=2"], **SIZES}
    out = tmp_path / "two"
    compressed_together(tmp_path, [{"model": str(model), "recipe": "whitened", "text": SELF, "out": str(out), **given}])
    spectrim.compress(model, "whitened", text=SELF, out=tmp_path / "one", **given)
    assert torch.equal(windows_of(tmp_path / "two.work"), windows_of(tmp_path / "one.work"))


# --- where there is none ---


def test_a_model_that_names_no_beginning_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = save_model(FAMILIES["llama"].make(bos_token_id=None), tmp_path / "dense")
    with pytest.raises(ValueError, match="bos_token_id"):
        spectrim.compress(model, "whitened", 0.3, SELF, tmp_path / "out", **SIZES)
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(llama_dir / "config.json", bare)
    with pytest.raises(ValueError, match="weights"):
        spectrim.compress(bare, "whitened", 0.3, SELF, tmp_path / "out", **SIZES)


def test_nobody_else_reads_it() -> None:
    with pytest.raises(ValueError, match=r"'self' is text that a model writes itself.*\./self"):
        evaluate(FAMILIES["llama"].make(), make_tokenizer(), SELF, window=24)
    with pytest.raises(ValueError, match="writes itself"):
        sample_windows([Source(SELF)], make_tokenizer(), 4, 8, seed=0)


def test_its_name_and_weight() -> None:
    assert parse_source("self") == Source(SELF) and parse_source("self=0.5") == Source(SELF, 0.5)


def test_a_limit_counts_the_whole_model_and_its_cache(llama_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(letters(400), encoding="utf-8")
    big = save_model(FAMILIES["llama"].make(num_hidden_layers=40, intermediate_size=512), tmp_path / "big")
    given: dict[str, Any] = {"memory": "15.6MB", "settings": ["calibrate.batch=2"], **SIZES}
    spectrim.compress(big, "whitened", 0.3, str(text), tmp_path / "streamed", **given)
    with pytest.raises(ValueError, match=r"to text \(model 8\.\d MB, cache"):
        spectrim.compress(big, "whitened", 0.3, SELF, tmp_path / "own", **given)
