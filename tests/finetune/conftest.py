"""What tests of tuning share: compressed model directories with a tokenizer, and rows to tune on."""

from __future__ import annotations

from pathlib import Path

import pytest

import spectrim
from spectrim.model import loading
from tests.conftest import letters, make_tokenizer
from tests.families import FAMILIES
from tests.model.test_loading import SIZES, compressed


@pytest.fixture(scope="session")
def small_dir(llama_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama compressed by whitened SVD in plain format."""
    out = tmp_path_factory.mktemp("small") / "plain"
    spectrim.compress(llama_dir, "whitened", 0.4, str(text_file), out, sequences=8, length=24)
    return out


@pytest.fixture(scope="session")
def every_format_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with tied embeddings and every format in it."""
    out = tmp_path_factory.mktemp("small") / "every"
    loading.save(compressed(FAMILIES["llama_tied"].make(), SIZES), out)
    make_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of 1000 letters."""
    path = tmp_path_factory.mktemp("rows") / "rows.txt"
    path.write_text(letters(1000, seed=5), encoding="utf-8")
    return path
