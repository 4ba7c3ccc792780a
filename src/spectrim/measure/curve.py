"""curve(): one model at several ratios from one work directory, what each loses, and where the curve bends.

Windows, statistics, decompositions and what allocators measured are shared, as of any runs on one work directory. Every
ratio is an ordinary checkpoint in a directory of its own, whole or absent; ratios that are there are not made again.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spectrim import finished, pipeline, sizes
from spectrim import recipe as recipes
from spectrim.core import launch, lock
from spectrim.core.progress import Progress, silent
from spectrim.core.store import hash_of, write_atomically, write_json
from spectrim.model.files import resolve
from spectrim.recipe import Recipe

logger = logging.getLogger(__name__)

FILE = "curve.json"


@dataclass(frozen=True)
class Row:
    """One ratio: the directory of its checkpoint, or why there is none.

    targets_kept: share of the targets' parameters; parameters: of the whole model; bytes: of its safetensors files.
    loss: excess (−log p of the next token over the dense model's) and kl, nats a token, with the windows they are of.
    """

    ratio: float
    directory: str | None = None
    targets_kept: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    loss: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Curve:
    """What curve() found: rows by ratio; knee: the ratio where the curve bends, None where it has no such place."""

    rows: list[Row]
    knee: float | None
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """The ratios that could not be made."""
        return [row for row in self.rows if row.error is not None]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON data."""
        return {**self.about, "knee": self.knee, "notes": self.notes, "rows": [asdict(row) for row in self.rows]}


def curve(
    model: str | Path,
    recipe: str | Recipe,
    ratios: Sequence[float],
    text: str | Sequence[str] | None,
    out: str | Path,
    *,
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    format: str | None = None,
    work: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    figure: bool = True,
    trust_remote_code: bool = False,
    settings: Sequence[str] = (),
    memory: str | int | None = None,
    progress: Progress = silent,
) -> Curve:
    """Compress a model directory (or hub name) at every ratio into `out`/RATIO, and write curve.json, .md and .png.

    The arguments are those of `compress`; work: by default `out`.work. Losses are measured on the windows of
    `calibrate.accept`, else of `select`, else not at all. A ratio that fails is a row with its message; where all do,
    the first error is raised. Raises ValueError before anything heavy for bad input, and for a directory that holds
    something else.
    """
    # over 50 lines for its signature and docstring alone
    launch.alone("compress --ratios")
    shortcuts = {"sequences": sequences, "length": length, "seed": seed, "format": format}
    asked = _recipes(recipe, ratios, shortcuts, settings)
    final, model = Path(out), str(model)
    options = {
        "model": model, "text": text, "work": work or f"{out}.work", "device": device, "dtype": dtype,
        "overwrite": overwrite, "trust_remote_code": trust_remote_code, "memory": memory, "progress": progress,
    }  # fmt: skip
    about = _about(model, asked, text, device, dtype)
    with lock.held(final, "--out"):
        _prepare(final, asked, about, overwrite)
        rows, errors = [], []
        for ratio, each in asked.items():
            try:
                rows.append(_made(final / f"{ratio:g}", ratio, each, options))
            except ValueError as error:
                logger.warning("ratio %g: %s", ratio, error)
                errors.append(error)
                rows.append(Row(ratio, error=str(error)))
        if len(errors) == len(rows):
            raise errors[0]
        found = Curve(rows, knee(rows), {**about, "dense": asdict(sizes.on_disk(resolve(model)))}, _notes(rows))
        _write(found, final, figure)
    return found


def _recipes(
    recipe: str | Recipe, ratios: Sequence[float], shortcuts: Mapping[str, Any], settings: Sequence[str]
) -> dict[float, Recipe]:
    """The recipe at each ratio, by rising ratio. Raises RecipeError for a ratio that cannot be, or is there twice."""
    if not ratios:
        raise recipes.RecipeError("a curve needs ratios: give some, such as .1,.2,.3")
    names = [f"{ratio:g}" for ratio in ratios]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise recipes.RecipeError(f"the ratio {twice[0]} is given twice")
    given = recipes.build(recipe, shortcuts, settings)
    return {ratio: recipes.build(given, {"ratio": ratio}) for ratio in sorted(ratios)}


def _about(
    model: str, asked: Mapping[float, Recipe], text: Any, device: Any, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What curve.json says of how it was made; `recipe_hash` leaves the ratio out."""
    recipe = recipes.build(next(iter(asked.values())), {"ratio": 0.0}).model_dump(exclude_none=True)
    return {
        "model": model, "text": [text] if isinstance(text, str) else list(text or ()), "device": str(device),
        "dtype": str(dtype or "as stored").removeprefix("torch."), "recipe": recipe, "recipe_hash": hash_of(recipe),
    }  # fmt: skip


def _prepare(out: Path, asked: Mapping[float, Recipe], about: Mapping[str, Any], overwrite: bool) -> None:
    """Raise ValueError where another curve, or another model, lies where this one goes."""
    file = out / FILE
    if file.exists() and not overwrite:
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [
            name for name in ("model", "text", "device", "dtype", "recipe_hash") if before.get(name) != about[name]
        ]
        if other:
            raise ValueError(
                f"{file} is a curve of other conditions ({', '.join(other)}); nothing was changed. Give another --out, "
                "or --overwrite to replace it"
            )
    for ratio, each in asked.items():
        wish = sizes.wish_of(each, None, measure=True)
        finished.refuse_filled(out / f"{ratio:g}", overwrite, finished.of_recipe(each, wish))


def _made(directory: Path, ratio: float, asked: Recipe, options: Mapping[str, Any]) -> Row:
    """The row of one ratio, which is made now unless it is there."""
    logger.info("ratio %g", ratio)
    made = pipeline.compress(recipe=asked, out=directory, measure=True, **options)
    counts, took = made.summary["parameters"], sizes.on_disk(directory)
    kept = counts["targets_after"] / counts["targets_before"]
    return Row(ratio, str(directory), kept, took.parameters, took.bytes, made.run.get("loss"))


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a reader has to know of the losses."""
    on = {row.loss["windows"] for row in rows if row.loss is not None}
    if not on:
        return ["no loss was measured: no windows are kept for it; set calibrate.accept (0.1, say) and give a text"]
    notes = []
    if "select" in on:
        notes.append("losses are of the windows of select, on which ranks were chosen: set calibrate.accept for others")
    if len([row for row in rows if row.loss is not None]) < 3:
        notes.append("a curve of fewer than 3 points has no knee")
    return notes


def knee(rows: Sequence[Row]) -> float | None:
    """The ratio whose point lies farthest below the chord of the curve, loss against parameters kept.

    Both axes are scaled to 0…1 between the first and the last point, so that units do not matter: the idea that is
    usual under the name kneedle (Satopää et al. 2011). None for fewer than 3 measured points, for a loss that does not
    rise from the largest model to the smallest, and where no point lies below the chord.
    """
    points = [(row.parameters, row.loss["excess"], row.ratio) for row in rows if row.loss and row.parameters]
    points = sorted(each for each in points if math.isfinite(each[1]))
    if len(points) < 3:
        return None
    (least, most_lost, _), (most, least_lost, _) = points[0], points[-1]
    if most <= least or most_lost <= least_lost:
        return None

    def below(kept: int, lost: float) -> float:
        return 1 - (kept - least) / (most - least) - (lost - least_lost) / (most_lost - least_lost)

    depth, ratio = max((below(kept, lost), ratio) for kept, lost, ratio in points[1:-1])
    return ratio if depth > 0 else None


# --- what is written ---


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, as text; data: `Curve.to_json()`."""
    header = ["ratio", "excess loss", "KL", "targets kept", "parameters", "of the model", "bytes", "note"]
    return header, [_line(row, data) for row in data["rows"]]


def _line(row: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    if row["error"] is not None:
        return [f"{row['ratio']:g}", "", "", "", "", "", "", "failed: " + " ".join(row["error"].split())]
    lost = [f"{row['loss'][name]:.4f}" for name in ("excess", "kl")] if row["loss"] else ["", ""]
    share = f"{row['parameters'] / data['dense']['parameters']:.2%}"
    note = "knee" if row["ratio"] == data["knee"] else ""
    return [
        f"{row['ratio']:g}", *lost, f"{row['targets_kept']:.2%}", f"{row['parameters']:,}", share,
        f"{row['bytes']:,}", note,
    ]  # fmt: skip


def _write(found: Curve, out: Path, draw: bool) -> None:
    data = found.to_json()
    write_json(out / FILE, data)
    write_atomically(out / "curve.md", lambda path: _markdown(data, path))
    if not draw or not any(row.loss for row in found.rows):
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("curve.png is not drawn: it needs matplotlib, pip install 'spectrim[report]'")
        return
    write_atomically(out / "curve.png", partial(figure(data).savefig, format="png", dpi=150))


def _markdown(data: Mapping[str, Any], path: str) -> None:
    header, rows = table(data)
    lines = [f"# {data['model']}", "", *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header)))]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines += ["", "Losses in nats a token over the dense model, bytes of the safetensors files.", ""]
    lines += [f"- {note}" for note in data["notes"]]
    lines.append(f"- calibration: {', '.join(data['text']) or 'no text'}, {data['recipe']['calibrate']}")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def figure(data: Mapping[str, Any]) -> Any:
    """Excess loss and KL against the share of the model's parameters, as a matplotlib Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in data["rows"] if row["loss"] is not None]
    shares = [100 * row["parameters"] / data["dense"]["parameters"] for row in rows]
    drawn = Figure(figsize=(5.5, 4), layout="constrained")
    FigureCanvasAgg(drawn)
    panel = drawn.subplots()
    panel.set(xlabel="model's parameters kept (%)", ylabel="nats a token over the dense model", title=data["model"])
    for name, marker in (("excess", "o"), ("kl", "s")):
        panel.plot(shares, [row["loss"][name] for row in rows], marker=marker, label=name)
    for share, row in zip(shares, rows, strict=True):
        if row["ratio"] == data["knee"]:
            panel.axvline(share, color="black", linestyle=":", label=f"knee, ratio {row['ratio']:g}")
    panel.legend()
    return drawn
