"""compare(): every recipe × ratio × format on the same calibration tokens, seed and parameter count, in one table.

Each cell is compressed in a process of its own, so that its peak memory is its own and running out of memory costs one
cell; it is measured here, where the dense model is held once. Cells are written one by one: a comparison that was
killed goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim import pipeline
from spectrim import recipe as recipe_files
from spectrim.core import launch, lock
from spectrim.core.progress import Progress, silent
from spectrim.core.store import hash_of, write_json
from spectrim.data import text as texts
from spectrim.measure import apart, plot, zero_shot
from spectrim.measure.evaluate import evaluate, parameters
from spectrim.model import loading
from spectrim.model.checkpoint import moved, quiet
from spectrim.model.files import file_hash, read_config, read_tokenizer, refuse_quantized, resolve, weight_files
from spectrim.recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

DENSE = "dense"
# how far the parameters kept may be from what the ratio asks, as a share of the targets' parameters
TOLERANCE = 0.005
_SAME = ("sequences", "length", "seed")  # what of `calibrate` decides the tokens


@dataclass(frozen=True)
class Row:
    """One cell: a recipe at a ratio in a format (the dense model: ratio 0, no format), or why it failed.

    texts: by held-out text nll (nats a token), perplexity, excess (nll over the dense model's), tokens, windows. kl:
    KL(dense ‖ compressed) on the first text, nats a token. parameters: of the targets and of the model, before and
    kept, counted in the files. seconds: compress and evaluate. made: artifacts this cell added to the store, by kind.
    peak_memory_bytes: resident high-water mark of the process that compressed (of the GPU: device_memory_bytes). tasks:
    acc and acc_norm with stderr. curves: what each step of a training reported, by name. best: the texts on which no
    other comparable cell of its format and ratio loses less.
    """

    recipe: str
    format: str | None
    ratio: float
    error: str | None = None
    texts: dict[str, dict[str, float | int]] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    kl: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    bytes: int | None = None
    index_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    tasks: dict[str, dict[str, float | None]] = field(default_factory=dict)
    recipe_hash: str | None = None
    curves: dict[str, list[float]] = field(default_factory=dict)
    directory: str | None = None
    comparable: bool = False
    best: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """What compare() found: the rows, dense first, then by format and ratio; `about` says how they were measured."""

    rows: list[Row]
    about: dict[str, Any]

    @property
    def failed(self) -> list[Row]:
        """The cells that could not be made or measured."""
        return [row for row in self.rows if row.error is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON data."""
        return {**self.about, "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class _Cell:
    """A recipe, with everything set, that is to be compressed and measured."""

    name: str
    recipe: Recipe
    ratio: float

    @property
    def format(self) -> str:
        return "+".join(sorted({group.format for group in self.recipe.groups}))


def compare(
    model: str,
    recipes: str | Sequence[str],
    ratios: Sequence[float],
    text: str | Sequence[str] | None,
    heldout: str | Sequence[str] | None,
    out: str | Path,
    *,
    formats: str | Sequence[str] = (),
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    window: int | None = None,
    limit: int | None = None,
    tasks: str | Sequence[str] = (),
    settings: Sequence[str] = (),
    work: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    keep: bool = False,
    figure: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Compress `model` with every recipe at every ratio in every format, measure each, and write tables to `out`.

    recipes: names or files; formats: by default each recipe's own. text: for calibration, as `compress` takes it;
    heldout: texts to measure on, KL on the first (the bundled model has both). window, limit: as in `evaluate`. tasks:
    names of lm-eval, or multiple-choice .jsonl files. work: the store all cells share (default `out`/work). keep: leave
    the checkpoints in `out`/models. A cell that fails is a row with its message; done ones are not run again. Raises
    ValueError before anything heavy for bad input, a missing extra, another comparison in `out`, and several processes.
    """
    # over 50 lines for its signature and docstring alone
    launch.alone("compare")
    own = {"text": ["reference"], "heldout": ["reference-evaluation"]} if model == "reference" else {}
    about: dict[str, Any] = {
        "model": model, "recipes": _several(recipes), "ratios": list(ratios), "formats": _several(formats),
        "text": _several(text) or own.get("text", []), "heldout": _several(heldout) or own.get("heldout", []),
        "window": window, "limit": limit, "tasks": _several(tasks), "settings": list(settings),
        "device": device, "dtype": str(dtype or "default").removeprefix("torch."),
    }  # fmt: skip
    if figure:
        plot.check()
    zero_shot.check(about["tasks"])
    cells = _cells(about, {"sequences": sequences, "length": length, "seed": seed})
    run = _Run(about, Path(out), Path(work or Path(out) / "work"), dtype, keep, trust_remote_code, progress)
    with lock.held(run.out, "--out"):  # the lock of the store is held by each cell's process while it works
        run.prepare(cells, overwrite)
        rows = [run.dense_row()]
        for number, cell in enumerate(cells):
            progress("compare", number, len(cells))
            rows.append(run.row(cell))
        progress("compare", len(cells), len(cells))
        found = Comparison(_ranked(rows, about["heldout"]), run.described(cells, rows[0]))
        write_json(run.out / "compare.json", data := found.to_json())
        plot.write_markdown(data, run.out / "compare.md")
        if figure and len(found.failed) < len(cells):
            plot.write_figure(data, run.out)
    return found


def _several(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _cells(about: Mapping[str, Any], calibrate: Mapping[str, int | None]) -> list[_Cell]:
    """Every recipe at every ratio in every format, by format and ratio. Raises ValueError where they cannot be one."""
    for name in ("recipes", "ratios", "heldout"):
        if not about[name]:
            raise ValueError(f"give at least one of --{name}")
    for name in ("recipes", "ratios", "formats", "heldout", "tasks"):
        twice = [value for value, count in Counter(about[name]).items() if count > 1]
        if twice:
            raise ValueError(f"--{name} names {twice[0]!r} twice")
    cells = []
    for format, ratio, name in product(about["formats"] or [None], about["ratios"], about["recipes"]):
        shortcuts = {"ratio": ratio, "format": format, **calibrate}
        recipe = recipe_files.build(name, shortcuts, about["settings"])
        for group in recipe.groups:
            if group.ratio != ratio or format not in (None, group.format):
                raise RecipeError("--set changes a ratio or format that is compared: use --ratios and --formats")
        cells.append(_Cell(name, recipe, ratio))
    for key in _SAME:
        found = {cell.name: getattr(cell.recipe.calibrate, key) for cell in cells}
        if len(set(found.values())) > 1:
            raise ValueError(f"the recipes differ in calibrate.{key} ({found}): give --{key}, so that all see one text")
    return sorted(cells, key=lambda cell: (cell.format, cell.ratio))


@dataclass
class _Run:
    """One comparison under way: what every cell shares."""

    about: Mapping[str, Any]
    out: Path
    work: Path
    dtype: torch.dtype | None
    keep: bool
    trust_remote_code: bool
    progress: Progress

    def __post_init__(self) -> None:
        about = self.about
        self.directory = resolve(about["model"])
        refuse_quantized(read_config(self.directory, self.trust_remote_code), about["model"])
        described = [p for p in self.directory.iterdir() if p.suffix in (".json", ".model", ".txt", ".jinja", ".py")]
        self.conditions = {
            "model": file_hash([*weight_files(self.directory), *sorted(described)]),
            "text": texts.fingerprint([texts.parse_source(name) for name in about["text"]]),
            "heldout": [[name, texts.fingerprint([texts.Source(name)])] for name in about["heldout"]],
            "tasks": zero_shot.fingerprint(about["tasks"]),
            **{name: about[name] for name in ("window", "limit", "device", "dtype")},
        }

    def prepare(self, cells: Sequence[_Cell], overwrite: bool) -> None:
        """Make `out` this comparison's. Raises ValueError if it holds something else, before changing anything."""
        asked = {**self.conditions, "cells": [[cell.name, cell.recipe.model_dump(mode="json")] for cell in cells]}
        request = self.out / "request.json"
        if request.exists():
            known = json.loads(request.read_text(encoding="utf-8"))
            different = sorted(name for name in asked if known.get(name) != asked[name])
            if not different and not overwrite:
                return
            if not overwrite and (self.out / "cells").exists():
                raise ValueError(
                    f"{self.out} holds another comparison ({', '.join(different)} differ); nothing was changed. Give "
                    "another --out, or --overwrite to replace it"
                )
            for name in ("cells", "models"):
                if (self.out / name).exists():
                    shutil.rmtree(self.out / name)
            for made in ("compare.json", "compare.md", *plot.FIGURES):
                (self.out / made).unlink(missing_ok=True)
        elif {path.name for path in self.out.iterdir()} - {"work", lock.NAME}:
            raise ValueError(f"{self.out} is no directory of a comparison; nothing was changed. Give another --out")
        write_json(request, asked)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return read_tokenizer(self.directory, self.trust_remote_code)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model, held for the divergence of every cell."""
        return self._open(self.directory)

    def _open(self, directory: Path) -> PreTrainedModel:
        dtype = self.dtype or pipeline.compute_dtype(self.about["device"])
        with quiet():
            model = loading.load(directory, dtype=dtype or "auto", trust_remote_code=self.trust_remote_code)
        return moved(model, torch.device(self.about["device"])).eval()

    def _file(self, fields: Mapping[str, Any]) -> Path:
        key = {"version": version("spectrim"), **self.conditions, **fields}
        return self.out / "cells" / f"{hash_of(key)}.json"

    def dense_row(self) -> Row:
        """The dense model measured, or read if that was done. Its failure is the whole comparison's."""
        file = self._file({"recipe": DENSE})
        if not file.exists():
            started = time.perf_counter()
            stored = parameters(self.directory)
            row = Row(DENSE, None, 0.0, kl=0.0, bytes=stored["bytes"], index_bytes=stored["index_bytes"])
            row = replace(row, parameters={"model_before": stored["total"], "model_kept": stored["total"]})
            row = self._measured(row, self.dense, None)
            write_json(file, asdict(replace(row, seconds={"evaluate": time.perf_counter() - started})))
        return _read(file)

    def row(self, cell: _Cell) -> Row:
        """A cell compressed and measured, or read if that was done; a failed one is tried again every time."""
        file = self._file({"recipe": cell.recipe.model_dump(mode="json"), "name": cell.name})
        directory = self.out / "models" / f"{Path(cell.name).stem}-{cell.format}-{cell.ratio:g}-{file.stem[:6]}"
        if file.exists() and (not self.keep or directory.exists()):
            return _read(file)
        row = Row(cell.name, cell.format, cell.ratio, directory=str(directory) if self.keep else None)
        try:
            row = self._made(row, cell, directory)
            write_json(file, asdict(row))
            return row
        # whatever went wrong with one cell is that cell's, and said: the others go on
        except Exception as error:
            logger.debug("%s at %s failed", cell.name, cell.ratio, exc_info=True)
            # of the compressing process the type is said already
            said = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            return replace(row, error=said or repr(error), directory=None)
        finally:
            _clean(directory, keep=self.keep and file.exists())

    def _made(self, row: Row, cell: _Cell, directory: Path) -> Row:
        before = _artifacts(self.work)
        done = apart.compress(
            {
                "model": self.about["model"], "recipe": cell.recipe, "text": self.about["text"] or None,
                "out": directory, "work": self.work, "device": self.about["device"], "dtype": self.dtype,
                "overwrite": True, "trust_remote_code": self.trust_remote_code,
            },
            self.progress,
        )  # fmt: skip
        started = time.perf_counter()
        stored, dense = parameters(directory), parameters(self.directory)["total"]
        targets = done.summary["parameters"]["targets_before"]
        row = replace(
            row,
            parameters={
                "targets_before": targets, "targets_kept": targets - (dense - stored["total"]),
                "model_before": dense, "model_kept": stored["total"],
            },
            bytes=stored["bytes"], index_bytes=stored["index_bytes"], recipe_hash=done.summary["recipe_hash"],
            peak_memory_bytes=done.peak_memory_bytes, device_memory_bytes=done.device_memory_bytes,
            made=dict(sorted((_artifacts(self.work) - before).items())),
            curves=done.summary["plan"].get("curves", {}),
        )  # fmt: skip
        row = self._measured(row, self._open(directory), self.dense)
        return replace(row, seconds={"compress": done.seconds, "evaluate": time.perf_counter() - started})

    def _measured(self, row: Row, model: PreTrainedModel, dense: PreTrainedModel | None) -> Row:
        """A row with what the model does on every text and task."""
        losses, protocol, kl = {}, {}, row.kl
        for number, name in enumerate(self.about["heldout"]):
            found = evaluate(
                model, self.tokenizer, name, self.about["window"], self.about["limit"],
                reference=dense if number == 0 else None,
                progress=lambda done, total: self.progress("evaluate", done, total),
            )  # fmt: skip
            losses[name] = {key: getattr(found, key) for key in ("nll", "perplexity", "tokens", "windows")}
            protocol[name] = found.protocol
            kl = found.kl if kl is None else kl
        scores = zero_shot.accuracies(model, self.tokenizer, self.about["tasks"])
        return replace(row, texts=losses, protocol=protocol, kl=kl, tasks=scores)

    def described(self, cells: Sequence[_Cell], dense: Row) -> dict[str, Any]:
        """How everything was measured."""
        calibrate = cells[0].recipe.calibrate
        packages = ["spectrim", "torch", "transformers", "safetensors", *(["lm_eval"] if self.about["tasks"] else [])]
        return {
            **self.about,
            "conditions": self.conditions,
            "protocol": dense.protocol,
            "calibration": {"text": self.about["text"], **{key: getattr(calibrate, key) for key in _SAME}},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "hardware": {
                "machine": platform.machine(), "device": self.about["device"], "threads": torch.get_num_threads()},
        }  # fmt: skip


def _read(file: Path) -> Row:
    return Row(**json.loads(file.read_text(encoding="utf-8")))


def _clean(directory: Path, keep: bool) -> None:
    """Remove a checkpoint unless it is to be kept, and in any case what a killed process left half written."""
    for path in [*directory.parent.glob(f".{directory.name}.*"), *([] if keep else [directory])]:
        if path.exists():
            shutil.rmtree(path)
    if directory.parent.exists() and not any(directory.parent.iterdir()):
        directory.parent.rmdir()


def _artifacts(work: Path) -> Counter[str]:
    """How many artifacts of each kind a store has; plans apart, which every cell makes."""
    return Counter(p.parent.name for p in work.glob("*/[!.]*") if p.parent.name != "plan")


def _ranked(rows: Sequence[Row], heldout: Sequence[str]) -> list[Row]:
    """The rows with excess, which of them compare, and the best of each format and ratio on each text."""
    dense, cells = rows[0].texts, [row for row in rows[1:] if row.error is None]
    groups = {id(row): [r for r in cells if (r.format, r.ratio) == (row.format, row.ratio)] for row in cells}
    rivals = {key: [row for row in group if _in_budget(row, group)] for key, group in groups.items()}
    found = []
    for row in rows:
        losses = {n: {**values, "excess": values["nll"] - dense[n]["nll"]} for n, values in row.texts.items()}
        others = [other for other in rivals.get(id(row), ()) if other is not row]
        comparable = row in rivals.get(id(row), ())
        best = [
            name for name in heldout if comparable and others
            and all(losses[name]["nll"] <= other.texts[name]["nll"] for other in others)
        ]  # fmt: skip
        found.append(replace(row, texts=losses, comparable=comparable, best=best))
    return found


def _in_budget(row: Row, group: Sequence[Row]) -> bool:
    """Whether the model keeps what the ratio asks of the most targets that one of the group has, within `TOLERANCE`."""
    counts = row.parameters
    targets = max(other.parameters["targets_before"] for other in group)
    removed = counts["model_before"] - counts["model_kept"]
    return abs(removed - row.ratio * targets) <= TOLERANCE * targets
