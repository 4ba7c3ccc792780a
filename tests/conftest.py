"""What all tests share: one thread, no network, and a tiny tokenizer, text and model directory made in memory."""

from __future__ import annotations

import os

# before anything imports the hub's client, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # 63, and <s>: tokens 1 to 63, and 0

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that asks for other threads leaves the next one with one."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and <s> before every document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0} | {"Ġ" if letter == " " else letter: i for i, letter in enumerate(LETTERS, start=1)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<s>")


def letters(count: int, seed: int = 0) -> str:
    """A text of `count` letters, each one token."""
    return "".join(random.Random(seed).choices(LETTERS, k=count))


def tree_hash(directory: Path, *left_out: str) -> dict[str, str]:
    """sha256 of every file under a directory, by relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in left_out
    }


def save_model(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """A model directory with weights, configuration and tokenizer."""
    model.save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of 1500 letters."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(letters(1500), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with biases and a tokenizer on disk; tests read it, none writes into it."""
    return save_model(FAMILIES["llama"].make(), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each driver was started and how many matrices were factorised."""
    from spectrim import driving
    from spectrim.methods import svd

    counted: Counter[str] = Counter()

    def counting(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    counting(driving, "streamed")
    counting(driving, "resident")
    counting(svd, "directions")
    return counted
