"""What the commands print: tables on stdout, notes on stderr, or one JSON object. Nothing is decided here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

out_console = Console()
err_console = Console(stderr=True)


def as_json(data: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def result(found: Any) -> None:
    """What a compression removed, and its notes."""
    counts = found.summary["parameters"]
    table = Table("", "before", "after", "removed", title=str(found.directory))
    for name in ("targets", "total"):
        before, after = counts[f"{name}_before"], counts[f"{name}_after"]
        table.add_row(f"{name} (parameters)", f"{before:,}", f"{after:,}", f"{1 - after / before:.2%}")
    out_console.print(table)
    for note in _grouped(found.plan.notes):
        err_console.print(note, highlight=False)


def _grouped(notes: Any) -> list[str]:
    """Notes with one reason a line, and how many modules it holds for; a note that stands alone as it is."""
    reasons: dict[str, list[str]] = {}
    for note in notes:
        reasons.setdefault(note.partition(": ")[2], []).append(note)
    return [
        own[0] if len(own) == 1 else f"{reason}: {len(own)} modules, such as {own[0].partition(': ')[0]}"
        for reason, own in reasons.items()
    ]


def evaluation(model: str, report: dict[str, Any]) -> None:
    """The figures of one model."""
    table = Table("measure", "value", title=model)
    for name, value in report.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    out_console.print(table)


def comparison(data: Any, out: Path) -> None:
    """The rows of a comparison, a line between ratios."""
    from spectrim.measure.plot import LEGEND, table

    header, rows = table(data)
    # a pipe has no width: there nothing is folded
    console = out_console if out_console.is_terminal else Console(width=400)
    shown = Table(*header, title=str(out))
    for row, following in zip(rows, [*rows[1:], []], strict=True):
        shown.add_row(*row, end_section=row[:2] != following[:2])
    console.print(shown)
    console.print(LEGEND, highlight=False)


def curve(data: Any, out: Path, as_data: bool) -> None:
    """The rows of a curve, and its notes; as_data: as one JSON object."""
    from spectrim.measure.curve import table

    if as_data:
        as_json(data)
        return
    header, rows = table(data)
    console = out_console if out_console.is_terminal else Console(width=400)
    shown = Table(*header, title=str(out))
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in data["notes"]:
        err_console.print(note, highlight=False)


def tuning(found: Any) -> None:
    """What a fine-tuning did, and its notes."""
    table = Table("", "", title=str(found.directory))
    losses = [entry["loss"] for entry in found.record["history"]]
    rows = {name: f"{found.record[name]:,}" for name in ("steps", "trainable_parameters")}
    rows |= {name: f"{found.record[name]:,}" for name in ("parameters_before", "parameters_after")}
    for name, value in (rows | {"training loss, first and last": f"{losses[0]:.4f}, {losses[-1]:.4f}"}).items():
        table.add_row(name.replace("_", " "), value)
    out_console.print(table)
    for note in _grouped(found.record["notes"]):
        err_console.print(note, highlight=False)


def estimate(found: Any, time: bool) -> None:
    """What a run would do and need; `time`: one block was timed."""
    data = found.to_json()
    table = Table("module", "role", "out × in", "becomes")
    for row in data["targets"]:
        choice = row["choice"]
        becomes = "dense" if found.plan else "decided after calibration"
        if choice:
            becomes = ", ".join([*choice["formats"].values(), *(f"{k} {v}" for k, v in choice["counts"].items())])
        table.add_row(row["name"], row["role"], f"{row['out']} × {row['in']}", becomes)
    out_console.print(table)
    for note in _grouped(data["notes"]):
        err_console.print(note, highlight=False)
    sums = Table("", "")
    for name, count in data["parameters"].items():
        sums.add_row(name, f"{count:,}")
    sums.add_row("peak memory, estimated", f"{sum(data['peak_memory_bytes'].values()) / 1e9:.2f} GB")
    sums.add_row("disk, output / work", " / ".join(f"{data['disk_bytes'][k] / 1e9:.2f} GB" for k in ("output", "work")))
    out_console.print(sums)
    needed = Table("stage", "memory beside imports", "disk", *(["time"] if time else []))
    for name, of_stage in data["stages"].items():
        sizes = (sum(of_stage["memory_bytes"].values()), of_stage["disk_bytes"])
        needed.add_row(
            name, *(f"{size / 1e9:.2f} GB" for size in sizes), *([_time(of_stage["seconds"])] if time else [])
        )
    out_console.print(needed)


def _time(seconds: float | None) -> str:
    """A time to read."""
    if seconds is None:
        return "not known"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def methods(tables: dict[str, dict[str, str]]) -> None:
    """Names of each kind, with what they are."""
    table = Table("kind", "name", "what")
    for kind, rows in tables.items():
        for name, about in rows.items():
            table.add_row(kind, name, about)
    out_console.print(table)


def demo(report: dict[str, Any], ratio: float) -> None:
    """Dense and compressed side by side."""
    table = Table("", "dense", "compressed", title=f"reference model, {ratio:.0%} of its target parameters removed")
    for name in ("parameters", "bytes", "perplexity", "nll", "kl"):
        table.add_row(name, *(_shown(report[side].get(name)) for side in ("dense", "compressed")))
    out_console.print(table)
    for side in ("dense", "compressed"):
        out_console.print(f"[bold]{side}[/bold] {report[side]['sample']}\n", highlight=False)
    out_console.print(report["protocol"], highlight=False)


def _shown(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


@contextmanager
def bars() -> Iterator[Any]:
    """A progress callback that draws one bar a stage on a terminal, and nothing elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    bars: dict[str, Any] = {}
    with Progress(*columns, console=err_console, disable=not err_console.is_terminal) as shown:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(stage, total=total)
            shown.update(bars[stage], completed=done, total=total)

        yield progress
