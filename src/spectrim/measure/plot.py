"""A comparison as a table, as markdown and as a figure, from the JSON data of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spectrim.core.store import write_atomically

FIGURES = ("compare.png", "compare.svg", "training.png", "training.svg")
_MARKERS = "osD^vP*X<>"
_BEST, _OUTSIDE = "★", "(not comparable)"
LEGEND = (
    f"{_BEST} least loss of the recipes in this format at this ratio. {_OUTSIDE}: the model keeps other than what the "
    "ratio asks, by over 0.5 % of the targets' parameters, and is not ranked. nll, excess (over dense) and KL(dense ‖ "
    "compressed), on the first text, in nats a token. Kept: share of the targets' and of the model's parameters. "
    "Seconds: to compress with what was in the store, and to measure. Made: what was not in the store. Peak: memory of "
    "the compressing process."
)


def check() -> None:
    """Raise ValueError where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib: pip install 'spectrim[report]', or go without (--no-plot)")


def text_labels(names: Sequence[str]) -> dict[str, str]:
    """Short names of texts: the file's, where no two are alike."""
    short = {name: Path(name).name for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, as text. data: `Comparison.to_json()`. A failed cell has its message in the last column."""
    tasks = sorted({name for row in data["rows"] for name in row["tasks"]})
    header = ["format", "ratio", "recipe"]
    for label in text_labels(data["heldout"]).values():
        header += [f"{label}: perplexity", "nll", "excess"]
    header += ["KL", "targets kept", "model kept", "parameters", "index bytes"]
    header += ["compress s", "evaluate s", "made", "peak MB"]
    header += [f"{task}: {metric}" for task in tasks for metric in ("acc", "acc_norm")]
    return [*header, "note"], [_line(row, data["heldout"], tasks) for row in data["rows"]]


def _line(row: Mapping[str, Any], heldout: Sequence[str], tasks: Sequence[str]) -> list[str]:
    cells = [row["format"] or "", f"{row['ratio']:g}" if row["format"] else "", row["recipe"]]
    for name in heldout:
        values = row["texts"].get(name, {})
        star = f" {_BEST}" if name in row["best"] else ""
        cells += [_number(values.get("perplexity"), ".4g"), _number(values.get("nll"), ".4f")]
        cells += [_number(values.get("excess"), ".4f") + star]
    counts, seconds = row["parameters"], row["seconds"]
    cells += [_number(row["kl"], ".4f"), _share(counts, "targets"), _share(counts, "model")]
    cells += [_number(counts.get("model_kept"), ","), _number(row["index_bytes"], ",")]
    cells += [_number(seconds.get("compress"), ".1f"), _number(seconds.get("evaluate"), ".1f")]
    made = ", ".join(f"{count} {kind}" for kind, count in row["made"].items())
    cells.append(made or ("all stored" if "compress" in seconds else ""))
    cells.append("" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:,.0f}")
    for task in tasks:
        cells += [_accuracy(row["tasks"].get(task, {}), metric) for metric in ("acc", "acc_norm")]
    return [*cells, _note(row)]


def _note(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return "failed: " + " ".join(row["error"].split())
    return _OUTSIDE if row["format"] and not row["comparable"] else ""


def _number(value: float | int | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _share(counts: Mapping[str, int], of: str) -> str:
    return f"{counts[f'{of}_kept'] / counts[f'{of}_before']:.2%}" if f"{of}_before" in counts else ""


def _accuracy(scores: Mapping[str, float | None], metric: str) -> str:
    error = scores.get(f"{metric}_stderr")
    return _number(scores.get(metric), ".3f") + ("" if error is None else f" ± {error:.3f}")


def write_markdown(data: Mapping[str, Any], file: Path) -> None:
    """The table, with how it was measured, in markdown."""
    header, rows = table(data)
    lines = [f"# {data['model']}", "", _row(header), "|" + " --- |" * len(header), *map(_row, rows), "", LEGEND, ""]
    lines += [f"- {name}: {protocol}" for name, protocol in data["protocol"].items()]
    used = data["calibration"]
    lines.append(
        f"- calibration: {', '.join(used['text']) or 'no text'}, {used['sequences']} sequences, seed {used['seed']}"
    )
    lines.append(f"- {', '.join(f'{name} {version}' for name, version in data['versions'].items())}")
    content = "\n".join(lines) + "\n"
    write_atomically(file, lambda path: _fill(path, content))


def _fill(path: str, content: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(content)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_figure(data: Mapping[str, Any], directory: Path) -> None:
    """`compare.png` and `compare.svg`; `training` likewise where something was trained. ValueError as `figure`."""
    drawn = {"compare": figure(data)}
    if any(row.get("curves") for row in data["rows"]):
        drawn["training"] = training(data)
    for name, each in drawn.items():
        for kind in ("png", "svg"):
            write_atomically(directory / f"{name}.{kind}", partial(each.savefig, format=kind, dpi=150))


def training(data: Mapping[str, Any]) -> Any:
    """What each step of every training reported: a row of panels a recipe, a line a format and ratio."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [row for row in data["rows"] if row.get("curves")]
    names = {recipe: [row for row in trained if row["recipe"] == recipe] for recipe in data["recipes"]}
    names = {recipe: rows for recipe, rows in names.items() if rows}
    across = max(len(rows[0]["curves"]) for rows in names.values())
    drawn = Figure(figsize=(1 + 3.2 * across, 0.5 + 2.8 * len(names)), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(names), across, squeeze=False)
    for line, (recipe, rows) in zip(panels, names.items(), strict=True):
        for panel in line[len(rows[0]["curves"]) :]:
            panel.set_axis_off()
        for panel, name in zip(line, rows[0]["curves"], strict=False):
            panel.set(title=f"{recipe}: {name}", xlabel="step")
            for row in rows:
                panel.plot(row["curves"][name], label=f"{row['format']} {row['ratio']:g}", linewidth=1)
        line[0].legend()
    return drawn


def figure(data: Mapping[str, Any]) -> Any:
    """Loss against parameters kept, a panel a text (down) and format (across), as a matplotlib Figure.

    A line a recipe through its comparable cells, the others as hollow marks; the dense model is the horizontal line.
    Raises ValueError where no cell was measured, or without matplotlib.
    """
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [row for row in data["rows"] if row["format"] and row["error"] is None]
    if not cells:
        raise ValueError("no cell was measured: there is nothing to draw")
    formats, labels = list(dict.fromkeys(row["format"] for row in cells)), text_labels(data["heldout"])
    drawn = Figure(figsize=(1 + 4.5 * len(formats), 0.5 + 3.5 * len(labels)), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(labels), len(formats), squeeze=False)
    for down, (name, label) in enumerate(labels.items()):
        for across, format in enumerate(formats):
            panel = panels[down][across]
            panel.set(title=f"{label}, {format}", xlabel="targets' parameters kept (%)", ylabel="loss (nats a token)")
            panel.axhline(data["rows"][0]["texts"][name]["nll"], color="black", linestyle="--", label="dense")
            _lines(panel, [row for row in cells if row["format"] == format], name, data["recipes"])
            panel.legend()
    return drawn


def _lines(panel: Any, cells: Sequence[Mapping[str, Any]], text: str, recipes: Sequence[str]) -> None:
    for number, recipe in enumerate(recipes):
        marker, colour = _MARKERS[number % len(_MARKERS)], f"C{number % 10}"
        points = sorted((*_point(row, text), row["comparable"]) for row in cells if row["recipe"] == recipe)
        ranked = [(x, y) for x, y, comparable in points if comparable]
        others = [(x, y) for x, y, comparable in points if not comparable]
        if ranked:
            panel.plot(*zip(*ranked, strict=True), color=colour, marker=marker, label=recipe)
        if others:
            label = f"{recipe} {_OUTSIDE}"
            panel.plot(*zip(*others, strict=True), color=colour, marker=marker, mfc="none", ls="none", label=label)


def _point(row: Mapping[str, Any], text: str) -> tuple[float, float]:
    counts = row["parameters"]
    return 100 * counts["targets_kept"] / counts["targets_before"], row["texts"][text]["nll"]
