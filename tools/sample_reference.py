"""Sample the two text files shipped beside the reference model from the model itself.

    python tools/sample_reference.py

writes reference_calibration.jsonl and reference_evaluation.jsonl beside the model's directory, one document a line as
{"text": ...}. Ancestral sampling: every token is drawn from the model's whole distribution (temperature 1, nothing cut
off), in float32, from `<|endoftext|>` until the next one or `--length` tokens. Such text has, by construction, the
statistics the model knows, and belongs to nobody else. The two files come from two generators, seeded `--seed` and
`--seed` + 1. The same command with the same torch gives the same bytes; takes two to three minutes on one core.
"""

import argparse
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parents[1] / "src" / "spectrim" / "assets"


@torch.inference_mode()
def sample(
    model: PreTrainedModel, start: int, batch: int, length: int, generator: torch.Generator
) -> Int[Tensor, "batch tokens"]:
    """Draw `batch` rows of at most `length` tokens, each begun after `start` and ended by it.

    What follows the first `start` in a row is to be ignored: rows are drawn until all have ended.
    """
    token = torch.full((batch, 1), start)
    ended = torch.zeros(batch, 1, dtype=torch.bool)
    tokens: list[Int[Tensor, "batch 1"]] = []
    cache = None
    while len(tokens) < length and not bool(ended.all()):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens.append(token)
        ended |= token == start
    return torch.cat(tokens, dim=1)


def texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, length: int, generator: torch.Generator
) -> Iterator[str]:
    """Yield sampled documents without end, batch by batch, save for blank ones and those that are not valid UTF-8."""
    start = tokenizer.bos_token_id
    while True:
        for row in sample(model, start, batch, length, generator).tolist():
            end = row.index(start) if start in row else len(row)
            text = tokenizer.decode(row[:end])
            assert isinstance(text, str)
            # A byte-level model may leave a character unfinished; the decoder marks that place with U+FFFD.
            if text.strip() and "\ufffd" not in text:
                yield text


def fill(documents: Iterator[str], size: int, seen: set[str]) -> list[str]:
    """Take documents not in `seen` until their UTF-8 text holds `size` bytes, and add them to `seen`."""
    taken: list[str] = []
    held = 0
    for text in documents:
        if text in seen:
            continue
        seen.add(text)
        taken.append(text)
        held += len(text.encode())
        if held >= size:
            break
    return taken


def write_rows(path: Path, rows: list[str]) -> None:
    """Write one {"text": row} a line, beside the final name first, so that no half file is ever seen."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "reference", help="directory of the model")
    parser.add_argument("--out", type=Path, default=ASSETS, help="directory for the two files")
    parser.add_argument("--calibration-bytes", type=int, default=350_000)
    parser.add_argument("--evaluation-bytes", type=int, default=150_000)
    parser.add_argument("--length", type=int, default=256, help="longest document, in tokens")
    parser.add_argument("--batch", type=int, default=64, help="documents drawn at the same time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Sample both files."""
    options = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)  # the order of float sums, and with it the text, depends on the number of threads
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    seen: set[str] = set()
    sizes = {"calibration": options.calibration_bytes, "evaluation": options.evaluation_bytes}
    for seed, (name, size) in enumerate(sizes.items(), start=options.seed):
        generator = torch.Generator().manual_seed(seed)
        rows = fill(texts(model, tokenizer, options.batch, options.length, generator), size, seen)
        path = options.out / f"reference_{name}.jsonl"
        write_rows(path, rows)
        logger.info("%s: %d documents, %d bytes, seed %d", path, len(rows), path.stat().st_size, seed)


if __name__ == "__main__":
    main()
