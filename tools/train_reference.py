"""Train a small Llama and its tokenizer from any text files, as the reference model was trained.

    python tools/train_reference.py --text a.txt b.jsonl --out DIR --minutes 80

A `.jsonl` file gives one document a line, its "text"; any other file is one document. Documents are joined into one
stream, `<|endoftext|>` before each, from which windows are drawn at random. AdamW, learning rate held at `--lr` after
the warm-up and from 40 % of the run falling linearly to 2 %. The strong weight decay is meant: it removes what is left
of the random initial values, so that the weights of so small a model get the low-rank structure that those of large
models have. `--steps` makes a run repeatable to the byte (same seed, threads and versions); `--minutes` fits one to the
clock.
"""

import argparse
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
WARMUP_STEPS = 100
HELD_SHARE = 0.4
LAST_RATE = 0.02
WEIGHT_DECAY = 0.2
GRADIENT_CLIP = 1.0
LOG_EVERY = 50


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; `length` is the window trained on, in tokens. Twice as many positions are allowed."""

    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    vocab: int = 4096
    length: int = 256

    def __post_init__(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden {self.hidden} is no even multiple of heads {self.heads}; change --hidden or --heads"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}; change --kv-heads")
        if self.vocab < 257:
            raise ValueError(f"vocab {self.vocab} does not hold the 256 bytes and {END}; give --vocab 257 or more")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: exactly one of `steps` and `minutes`; `batch` windows a step; `lr` is the highest rate."""

    steps: int | None = None
    minutes: float | None = None
    batch: int = 16
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"give either steps or minutes; got steps {self.steps} and minutes {self.minutes}")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over after `step` steps and `seconds` seconds; 1 or more: it is done."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of step `step` (from 0): linear warm-up, held, then linear down to `LAST_RATE` of `lr`."""
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        fall = max(0.0, (progress - HELD_SHARE) / (1 - HELD_SHARE))
        return self.lr * warm * (1 - (1 - LAST_RATE) * fall)


def read_documents(paths: list[Path]) -> list[str]:
    """Read the documents of all files, in order; blank ones are left out. ValueError names a row without text."""
    documents: list[str] = []
    for path in paths:
        content = path.read_text(encoding="utf-8")
        documents.extend(read_rows(path, content) if path.suffix == ".jsonl" else [content])
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"no text in {', '.join(map(str, paths))}; give files that hold some with --text")
    return documents


def read_rows(path: Path, content: str) -> Iterator[str]:
    """Yield the "text" of each JSON line."""
    # Not splitlines(): it also cuts at characters such as U+2028, which JSON leaves bare inside a string.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}, line {number}: expected {{"text": "..."}}, got {line[:60]}')
            yield row["text"]


def train_tokenizer(documents: list[str], vocab: int) -> FastTokenizer:
    """Train a byte-level BPE of `vocab` pieces at most; `<|endoftext|>` is piece 0 and begins, ends and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return FastTokenizer(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " tokens"]:
    """Join all documents into one stream of tokens, `<|endoftext|>` before each."""
    stream: list[int] = []
    for document in documents:
        stream.append(tokenizer.bos_token_id)
        stream.extend(tokenizer.encode(document, add_special_tokens=False))
    return torch.tensor(stream)


def build_model(shape: Shape, vocab: int, seed: int) -> LlamaForCausalLM:
    """Make the model with seeded random weights in float32; `vocab` is the size the tokenizer really has."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * shape.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def make_optimizer(model: PreTrainedModel, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the gains of the norms alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def windows(
    stream: Int[Tensor, " tokens"], length: int, batch: int, seed: int
) -> Iterator[Int[Tensor, "batch length"]]:
    """Yield batches of windows from random places of the stream, without end. ValueError if it is shorter than one."""
    if len(stream) < length:
        raise ValueError(
            f"the text has {len(stream)} tokens, fewer than one window of {length}; add text or cut --length"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - length + 1, (batch, 1), generator=generator)
        yield stream[starts + torch.arange(length)]


def train(model: PreTrainedModel, stream: Int[Tensor, " tokens"], length: int, schedule: Schedule) -> list[float]:
    """Train the model in place; returns each step's loss (mean cross-entropy a token, in nats)."""
    optimizer = make_optimizer(model, schedule.lr)
    draw = windows(stream, length, schedule.batch, schedule.seed)
    model.train()
    losses: list[float] = []
    began = time.monotonic()
    while (progress := schedule.progress(len(losses), time.monotonic() - began)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(len(losses), progress)
        batch = next(draw)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % LOG_EVERY == 0:
            recent = sum(losses[-LOG_EVERY:]) / LOG_EVERY
            logger.info("step %d (%.0f %%): loss %.3f", len(losses), 100 * progress, recent)
    return losses


def require_new(out: Path) -> None:
    """Raise ValueError if something lies at `out` already."""
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or give another --out")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write model (bf16), generation config and tokenizer beside `out`, then rename: all of it is there or nothing."""
    require_new(out)
    part = out.with_name(out.name + ".part")
    if part.exists():  # left by a run that was killed here
        shutil.rmtree(part)
    part.mkdir(parents=True)
    model.bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    os.rename(part, out)


def run(texts: list[Path], out: Path, shape: Shape, schedule: Schedule) -> list[float]:
    """Tokenizer, model, training, saving; returns each step's loss. ValueError if `out` exists already."""
    require_new(out)
    documents = read_documents(texts)
    tokenizer = train_tokenizer(documents, shape.vocab)
    stream = pack(documents, tokenizer)
    model = build_model(shape, len(tokenizer), schedule.seed)
    logger.info("%d documents, %d tokens, %d parameters", len(documents), len(stream), model.num_parameters())
    losses = train(model, stream, shape.length, schedule)
    save(model, tokenizer, out)
    logger.info("%d steps, last loss %.3f, written to %s", len(losses), losses[-1], out)
    return losses


def arguments() -> argparse.Namespace:
    """Read the command line; sizes and schedule default to those of the reference model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist yet")
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "length"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Shape, name))
    duration = parser.add_mutually_exclusive_group(required=True)
    duration.add_argument("--steps", type=int)
    duration.add_argument("--minutes", type=float)
    parser.add_argument("--batch", type=int, default=Schedule.batch, help="windows a step")
    parser.add_argument("--lr", type=float, default=Schedule.lr, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=Schedule.seed)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train and save what the command line asks for."""
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    shape = Shape(
        options.hidden, options.layers, options.heads, options.kv_heads, options.ffn, options.vocab, options.length
    )
    schedule = Schedule(options.steps, options.minutes, options.batch, options.lr, options.seed)
    run(options.text, options.out, shape, schedule)


if __name__ == "__main__":
    main()
