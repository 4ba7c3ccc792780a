"""Text to tokens: files and names to documents, one token stream, and windows of it.

A *document* is what a tokenizer puts its special tokens around: a whole .txt file, or one row of the other formats.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

logger = logging.getLogger(__name__)

# The text that the model writes itself.
SELF = "self"
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
BUNDLED = {"reference": "reference_calibration.jsonl", "reference-evaluation": "reference_evaluation.jsonl"}
_SPLITS = ("train", "validation", "test")
_BATCH = 1024  # documents tokenised in one call: bounds the memory the Python lists of ids take


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer: any tokenizer of transformers answers to it."""

    def __call__(self, text: list[str], /, **options: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Source:
    """A text by file or name (`self` too) and its share among several. ValueError for no name or a weight not > 0."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a text source needs a file or a name before its weight: FILE=0.25")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of text source {self.name!r} is {self.weight}: it must be a number above 0")


def parse_source(text: str) -> Source:
    """`FILE`, or `FILE=0.25` with a weight; where a file of the whole name exists, the whole is the name.

    Raises ValueError if what follows the last `=` is not a number above 0.
    """
    name, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_file():
        return Source(text)
    try:
        return Source(name, float(weight))
    except ValueError as error:
        raise ValueError(
            f"text source {text!r}: no such file, and no FILE=0.25 with a number as its weight: {error}"
        ) from error


def read_documents(name: str, field: str = "text") -> list[str]:
    """The documents of a file, of a bundled text or of a dataset of the `datasets` library, in their order.

    name: a .txt file is one document, whole; .jsonl holds one a row, .json a list, .parquet a column: objects with the
    text under `field` (.jsonl and .json may also hold plain strings). `reference` and `reference-evaluation` are the
    texts inside the package. Any other name that is no file is a dataset, `NAME[:CONFIG][:SPLIT]`, by default its
    train split. Empty documents among others are kept. Raises ValueError for a file that is missing, of an unknown
    kind or malformed (with the row), and for a text without one non-empty document.
    """
    documents = [_document(row, field, where) for where, row in _rows(name, field)]
    if not any(document.strip() for document in documents):
        raise ValueError(
            f"{name}: it holds no text: {len(documents)} documents, none of them with more than white space"
        )
    return documents


def read_rows(name: str) -> Iterator[tuple[str, Any]]:
    """Every row of what `read_documents` reads, whole: where it stands (file and line), and what it holds.

    A row of .jsonl and .json is what its JSON says, of .parquet and a dataset a mapping of its columns; a .txt file is
    one string. ValueError as for `read_documents`, at the row where it is met; no row is judged by what it holds.
    """
    return _rows(name, None)


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> Int[Tensor, "n"]:
    """Every document tokenised with its special tokens, as `tokenizer(text)` gives them, joined in order to one stream.

    Raises ValueError if there is no document.
    """
    if not documents:
        raise ValueError("no documents to tokenise: give at least one")
    pieces = []
    for start in range(0, len(documents), _BATCH):
        # verbose=False: a document longer than the model's positions is no mistake here, it is cut into windows
        encoded = tokenizer(
            list(documents[start : start + _BATCH]), verbose=False, return_attention_mask=False, padding=False
        )
        pieces += [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
    return torch.cat(pieces)


def fixed_windows(stream: Int[Tensor, "n"], window: int, limit: int | None = None) -> Int[Tensor, "windows window"]:
    """The stream cut into windows that do not overlap, from its start, tail dropped; only the first `limit` if given.

    Raises ValueError if the stream is shorter than one window.
    """
    if window < 1 or (limit is not None and limit < 1):
        raise ValueError(f"window ({window}) and limit ({limit}) must be at least 1")
    count = stream.numel() // window
    if count == 0:
        raise ValueError(
            f"the text has {stream.numel()} tokens, one window needs {window}: give a longer text or a smaller window"
        )
    return stream[: count * window].view(count, window)[:limit]


def sample_windows(
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    sequences: int,
    length: int,
    seed: int,
    own: Callable[[int], Int[Tensor, "_ length"]] | None = None,
) -> Int[Tensor, "sequences length"]:
    """`sequences` windows of `length` tokens, drawn without replacement from the fixed windows of the sources' streams.

    The sources share the sequences by weight (largest remainder, ties to the earlier) and come mixed. One generator,
    seeded with `seed`, draws everything but what `own` gives, windows of the source `self` by their number. tokenizer:
    of all other sources. Raises ValueError if a source has too few tokens or is named twice, for `self` without `own`
    and for others without a tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for source, stream, chosen in _drawn(sources, tokenizer, sequences, length, generator):
        if stream is not None:
            drawn.append(fixed_windows(stream, length)[chosen])
        elif own is not None:
            drawn.append(own(len(chosen)))
        else:
            _locate(source.name)  # which says that nobody writes here
    return torch.cat(drawn)[torch.randperm(sequences, generator=generator)]


def windows_beside(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    sequences: int,
    length: int,
    seed: int,
    held: Sequence[int],
    window: int,
) -> list[Int[Tensor, "windows window"]]:
    """Of each source the windows of `window` tokens that share no token with some that `sample_windows` gives.

    held: the numbers of those, in what it gives for the same sources, tokenizer, sequences, length and seed. Between
    them each stream is cut from the end of one to the start of the next, the tails dropped; a source may have none, and
    what a model writes itself has none.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = list(_drawn(sources, tokenizer, sequences, length, generator))
    order = torch.randperm(sequences, generator=generator)
    taken = order[torch.as_tensor(held, dtype=torch.int64)]
    found, before = {source.name: torch.empty(0, window, dtype=torch.int64) for source in sources}, 0
    for source, stream, chosen in drawn:
        own = taken[(taken >= before) & (taken < before + len(chosen))] - before
        before += len(chosen)
        if stream is None:
            continue
        starts = (chosen[own] * length).sort().values.tolist()
        ends = [0, *(start + length for start in starts)]
        stretches = [stream[end:start] for end, start in zip(ends, [*starts, stream.numel()], strict=True)]
        cut = [fixed_windows(each, window) for each in stretches if each.numel() >= window]
        if cut:
            found[source.name] = torch.cat(cut)
    return [found[source.name] for source in sources]


def _drawn(
    sources: Sequence[Source], tokenizer: Tokenizer | None, sequences: int, length: int, generator: torch.Generator
) -> Iterator[tuple[Source, Int[Tensor, "n"] | None, Int[Tensor, "chosen"]]]:
    """Of each source that gives any window: its stream, and which of its fixed windows; ValueError as said above.

    What a model writes itself is no stream: as many windows as are wanted, in order.
    """
    if sequences < 1 or length < 1:
        raise ValueError(f"sequences ({sequences}) and length ({length}) must be at least 1")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"a text source is named twice among {names}: give it once, with the sum of the weights")
    for source, count in zip(sources, shares(sources, sequences), strict=True):
        if count == 0:
            logger.warning("%s gets none of the %d sequences: its weight is too small", source.name, sequences)
            continue
        if source.name == SELF:
            yield source, None, torch.arange(count)
            continue
        documents = read_documents(source.name)
        if tokenizer is None:
            raise ValueError(f"{source.name}: a text is read with the model's tokenizer: give that too")
        stream = token_stream(documents, tokenizer)
        available = stream.numel() // length
        if available < count:
            raise ValueError(
                f"{source.name}: {count} sequences of {length} tokens need {count * length} tokens, it has "
                f"{stream.numel()}: give a longer text, or ask for fewer or shorter sequences"
            )
        yield source, stream, torch.randperm(available, generator=generator)[:count]


def fingerprint(sources: Sequence[Source]) -> str:
    """A sha256 over what the sources hold and weigh, in order: the part of a store key that stands for the text.

    Of a file (a bundled text too) the bytes count, not the name; of a dataset only the name is known, and of the text
    that a model writes itself nothing.
    """
    digest = hashlib.sha256()
    for source in sources:
        path = None if source.name == SELF else _locate(source.name)
        if path is None:
            kind, content = "dataset", hashlib.sha256(source.name.encode()).hexdigest()
        else:
            with path.open("rb") as file:
                # the suffix decides how the same bytes are split into documents
                kind, content = path.suffix.lower(), hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([kind, content, float(source.weight)]).encode())
    return digest.hexdigest()


def shares(sources: Sequence[Source], sequences: int) -> list[int]:
    """How many of the sequences each source gives: floors of the exact shares, the rest by largest remainder."""
    if not sources:
        raise ValueError("no text source: give at least one file or name")
    total = math.fsum(source.weight for source in sources)
    exact = [sequences * source.weight / total for source in sources]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: sequences - sum(counts)]:
        counts[i] += 1
    return counts


def _locate(name: str) -> Path | None:
    """The file a name stands for, or None where it can only be a dataset's name. ValueError if it can be neither."""
    if name == SELF:
        raise ValueError(
            f"{SELF!r} is text that a model writes itself, which only its compression is calibrated on; a file of that "
            f"name is ./{SELF}"
        )
    if name in BUNDLED:
        path = Path(str(resources.files("spectrim") / "assets" / BUNDLED[name]))
        if not path.is_file():
            raise ValueError(f"the bundled text {name!r} is missing from this installation: install spectrim again")
        return path
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{name}: cannot tell how to read it: the name must end in one of {SUFFIXES}")
        return path
    if path.is_dir():
        raise ValueError(f"{name} is a folder: name one file in it, of a kind among {SUFFIXES}")
    if path.suffix.lower() in SUFFIXES:
        raise ValueError(f"no such file: {name}; {_nearest(path)}")
    return None


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return f"nearest in {path.parent}: {', '.join(close)}" if close else f"nothing like it in {path.parent}"


def _rows(name: str, field: str | None) -> Iterator[tuple[str, Any]]:
    """Rows with their places; of a parquet file and a dataset only the column `field` where one is given."""
    path = _locate(name)
    return _dataset_rows(name, field) if path is None else _file_rows(path, field)


def _file_rows(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, field)
    try:
        content = path.read_text(encoding="utf-8-sig")  # -sig: a byte-order mark is not text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}): convert it first") from error
    if suffix == ".txt":
        return iter([(str(path), content)])
    return _jsonl_rows(path, content) if suffix == ".jsonl" else _json_rows(path, content)


def _jsonl_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    # split on \n only: splitlines() would also cut at the line separators that JSON allows inside strings
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds {type(rows).__name__}, not a list of rows (one object a line is .jsonl)")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, item {number}", row


def _document(row: Any, field: str, where: str) -> str:
    if isinstance(row, Mapping):
        if field not in row:
            raise ValueError(f"{where}: has no {field!r}, only {sorted(row)}")
        row = row[field]
    if not isinstance(row, str):
        raise ValueError(f"{where}: the text must be a string, got {type(row).__name__}")
    return row


def _parquet_rows(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'spectrim[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    with file:
        if field is not None and field not in file.schema_arrow.names:
            raise ValueError(f"{path}: has no column {field!r}, only {file.schema_arrow.names}")
        values = file.read().to_pylist() if field is None else file.read(columns=[field]).column(field).to_pylist()
    for number, value in enumerate(values, start=1):
        yield f"{path}, row {number}", value


def _dataset_rows(name: str, field: str | None) -> Iterator[tuple[str, Any]]:
    # CONFIG holds no bracket, so that the colon of a slice such as train[:1000] is not taken for a separator
    match = re.fullmatch(r"([^:]+)(?::([^:\[\]]+))??(?::([^:\[\]]+(?:\[.*\])?))?", name)
    if match is None:
        raise ValueError(f"{name!r}: no such file, and not the name of a dataset, NAME[:CONFIG][:SPLIT]")
    dataset, config, split = match.groups()
    if config is None and split is not None and "[" not in split and split not in _SPLITS:
        config, split = split, None  # one word after the name is a split only if it is called like one
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name!r}: no such file; to read it as a dataset, install the library: pip install 'spectrim[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(dataset, config, split=split or "train")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r}: no such file, and no dataset that can be loaded: {error}") from error
    if field is not None and field not in rows.column_names:
        raise ValueError(f"{name!r}: the dataset has no column {field!r}, only {rows.column_names}")
    for number, value in enumerate(rows if field is None else rows[field], start=1):
        yield f"{name}, row {number}", value
