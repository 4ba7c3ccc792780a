"""The command line: parses and calls; `show` prints; no logic. Heavy imports wait until a command runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from spectrim import show
from spectrim.core import launch
from spectrim.show import err_console, out_console

app = typer.Typer(
    help="Make language models smaller by low-rank decomposition.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Model directory, hub name, or `reference` (the bundled model).")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Recipe name (see `spectrim methods`) or YAML file.")]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Fraction of the targets' parameters to remove.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Not --ratio but bytes of the files at most: 4GB.")]
Parameters = Annotated[float | None, typer.Option("--parameters", help="Not --ratio but numbers in all: 3.2e9.")]
Text = Annotated[
    list[str] | None, typer.Option("--text", help="Text file, dataset or `self`; repeat for a mixture, NAME=WEIGHT.")
]
Sequences = Annotated[int | None, typer.Option("--sequences", help="Calibration windows.")]
Length = Annotated[int | None, typer.Option("--length", help="Tokens in a calibration window.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the choice of calibration windows.")]
Device = Annotated[str, typer.Option("--device", help="Where blocks are run and factorised.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Cast weights to it (float32, bfloat16, …).")]
Format = Annotated[str | None, typer.Option("--format", help="plain (as published) or pivot (fewer numbers).")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any key of the recipe: a.b=c.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a filled output directory.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")]
Memory = Annotated[str | None, typer.Option("--memory", help="What a run may hold beside its imports: 6GB, 512MiB.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

logger = logging.getLogger("spectrim")


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: what tidies up after Ctrl-C does so after it too."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not stop the tidying up
    raise _Terminated


@contextmanager
def _failures() -> Iterator[None]:
    """Bad input as one message: exit code 2 for what was asked, 1 for what failed, 128 + its number for a signal.

    Of several processes the first one warns; each says what went wrong in itself.
    """
    level = logging.WARNING if launch.first() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except Exception as error:
        from spectrim.core.store import StoreError
        from spectrim.recipe import RecipeError

        if not isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError, StoreError)):
            raise

        err_console.print(f"[red]error{launch.which()}:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        if os.environ.get("SPECTRIM_TRACEBACK"):
            raise
        raise typer.Exit(2 if isinstance(error, RecipeError) else 1) from error
    except KeyboardInterrupt as stopped:
        word, number = ("terminated", 143) if isinstance(stopped, _Terminated) else ("interrupted", 130)
        if launch.first():
            err_console.print(f"{word}; no output was written, and finished work is kept for the next run")
        raise typer.Exit(number) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _alone(command: str) -> None:
    """Refuse to run in several processes."""
    if not launch.first():
        raise SystemExit(0)  # the first one says it
    launch.alone(command)


@contextmanager
def _joined(device: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Together with the processes of one torchrun, if there are several; what they do alike fails in one of them."""
    if launch.processes() == 1:
        yield nullcontext
        return
    import torch

    from spectrim.core import distributed

    with distributed.joined(torch.device(device)):
        yield distributed.alike


def _dtype(name: str | None) -> Any:
    import torch

    if name is None or name == "auto":
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise typer.BadParameter(f"--dtype {name}: no floating-point dtype of torch; try float32, bfloat16 or float16")
    return dtype


def _recipe(recipe: str, ratio: float | None, format: str | None, settings: list[str] | None, **calibrate: Any) -> Any:
    from spectrim import recipe as recipes

    return recipes.build(recipe, {"ratio": ratio, "format": format, **calibrate}, settings or [])


@app.command()
def compress(
    model: Model,
    out: Out,
    recipe: RecipeName = "default",
    ratio: Ratio = None,
    budget: Budget = None,
    parameters: Parameters = None,
    max_loss: Annotated[float | None, typer.Option("--max-loss", help="Not --ratio but nats a token lost.")] = None,
    ratios: Annotated[list[str] | None, typer.Option("--ratios", help="A curve: .1,.2,.3, into OUT/RATIO.")] = None,
    text: Text = None,
    sequences: Sequences = None,
    length: Length = None,
    seed: Seed = None,
    work: Annotated[Path | None, typer.Option("--work", help="Where finished work is kept (default OUT.work).")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    format: Format = None,
    tokens: Annotated[
        float | None, typer.Option("--tokens", help="Of text to tune on, where the recipe tunes.")
    ] = None,
    memory: Memory = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Compress MODEL into a smaller checkpoint that plain transformers loads."""
    with _failures(), show.bars() as progress, _joined(device) as alike:
        with alike():
            asked = _recipe(recipe, ratio, format, set_, sequences=sequences, length=length, seed=seed, tokens=tokens)
            kind = _dtype(dtype)
            from spectrim import commands

            several = [_number(each) for each in _listed(ratios)] if ratios else None
            size = commands.how_small(ratio, budget, parameters, max_loss, several)
        result = commands.compress(
            model, asked, size, text=text, out=out, work=work, device=device, dtype=kind, overwrite=overwrite,
            trust_remote_code=trust_remote_code, memory=memory, progress=progress,
        )  # fmt: skip
    if not launch.first():
        return
    if ratios:
        show.curve(result.to_json(), out, as_json)
        raise typer.Exit(1 if result.failed else 0)
    if as_json:
        show.as_json({**result.summary, "run": result.run})
        return
    show.result(result)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[str | None, typer.Option("--text", help="Text file or dataset.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens in a window.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The first N windows only.")] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Dense model: adds the KL to it.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Prefill and decode against the dense model.")] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Start of the generated sample.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity, parameters and bytes of a model; with --reference the KL, with --speed the speed."""
    with _failures(), show.bars() as progress:
        _alone("evaluate")
        from spectrim import commands

        report = commands.evaluate(
            model, text, window, limit, reference, speed, prompt, device, _dtype(dtype), trust_remote_code, progress
        )
    if as_json:
        show.as_json(report)
        return
    show.evaluation(model, report)


@app.command()
def compare(
    model: Model,
    out: Out,
    recipes: Annotated[list[str], typer.Option("--recipes", help="Recipe names or YAML files: a,b,c.")],
    ratios: Annotated[list[str], typer.Option("--ratios", help="Fractions to remove: .1,.2,.4.")],
    text: Text = None,
    heldout: Annotated[list[str] | None, typer.Option("--heldout", help="Texts to measure on; the first: KL.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--formats", help="plain,pivot (default: the recipes').")] = None,
    tasks: Annotated[list[str] | None, typer.Option("--tasks", help="lm-eval names or multiple-choice .jsonl.")] = None,
    sequences: Sequences = None,
    length: Length = None,
    seed: Seed = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens in a window of a held-out text.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The first N windows only.")] = None,
    work: Annotated[Path | None, typer.Option("--work", help="The store all cells share (default OUT/work).")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another comparison in OUT.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoints in OUT/models.")] = False,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw compare.png and .svg.")] = True,
    trust_remote_code: Trust = False,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Measure recipes against each other at the same ratios, on the same text; a killed comparison goes on."""
    with _failures(), show.bars() as progress:
        _alone("compare")
        wanted = [_number(each) for each in _listed(ratios)]
        from spectrim.measure.compare import compare as run

        found = run(
            model, _listed(recipes), wanted, text, _listed(heldout), out, formats=_listed(formats),
            sequences=sequences, length=length, seed=seed, window=window, limit=limit, tasks=_listed(tasks),
            settings=set_ or [], work=work, device=device, dtype=_dtype(dtype), overwrite=overwrite, keep=keep,
            figure=plot, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        show.as_json(found.to_json())
    else:
        show.comparison(found.to_json(), out)
    if found.failed:
        err_console.print(f"{len(found.failed)} of {len(found.rows) - 1} cells failed; run again to try those again")
        raise typer.Exit(1)


def _listed(values: list[str] | None) -> list[str]:
    """Options given once or more, each `a,b,c`, but for a file with a comma in its name."""
    return [each for value in values or () for each in ([value] if Path(value).is_file() else value.split(",")) if each]


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise typer.BadParameter(f"--ratios {value}: no number") from error


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="A compressed model directory (for `prune` a dense one).")],
    data: Annotated[str, typer.Option("--data", help="Text, instructions or chats: a file or dataset.")],
    out: Out,
    method: Annotated[str, typer.Option("--method", help="How (see `spectrim methods`).")] = "rank_preserving",
    dense: Annotated[str | None, typer.Option("--dense", help="The dense model that `mixed_rank` needs.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="A dense model to learn from (KL).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the optimizer.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data (default 1).")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows a step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Default: the method's.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens in a row.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the order of rows and of new weights.")] = None,
    report_to: Annotated[list[str] | None, typer.Option("--report-to", help="wandb, tensorboard, …")] = None,
    work: Annotated[Path | None, typer.Option("--work", help="Where checkpoints lie (default OUT.work).")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="method.KEY=…, train.KEY=…, data.KEY=…")] = None,
    as_json: Json = False,
) -> None:
    """Recover what compression lost: tune a compressed MODEL without giving back a parameter."""
    with _failures(), show.bars() as progress:
        from spectrim.tuning import tune

        reports = [f"train.report_to=[{', '.join(report_to)}]"] if report_to else []
        found = tune(
            model, data, out, method, dense=dense, teacher=teacher, steps=steps, epochs=epochs, batch_size=batch_size,
            learning_rate=learning_rate, window=window, seed=seed, work=work, device=device, overwrite=overwrite,
            trust_remote_code=trust_remote_code, settings=[*reports, *(set_ or [])], progress=progress,
        )  # fmt: skip
    if as_json:
        show.as_json({**found.record, "run": found.run})
        return
    show.tuning(found)


@app.command()
def plan(
    model: Model,
    recipe: RecipeName = "default",
    ratio: Ratio = None,
    budget: Budget = None,
    parameters: Parameters = None,
    sequences: Sequences = None,
    length: Length = None,
    format: Format = None,
    device: Device = "cpu",
    memory: Memory = None,
    time: Annotated[bool, typer.Option("--time", help="Time one block, and say how long a run will take.")] = False,
    trust_remote_code: Trust = False,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Say what a run would do and need, before anything heavy."""
    with _failures():
        _alone("plan")
        asked = _recipe(recipe, ratio, format, set_, sequences=sequences, length=length)
        from spectrim import commands
        from spectrim.estimate import estimate

        size = commands.how_small(ratio, budget, parameters)
        found = estimate(model, asked, device, trust_remote_code, memory, time, **size)
    if as_json:
        show.as_json(found.to_json())
        return
    show.estimate(found, time)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A compressed model directory.")],
    out: Out,
    format: Annotated[str, typer.Option("--format", help="dense: plain weights that anything loads.")] = "dense",
    dtype: Dtype = None,
) -> None:
    """Write a compressed model in a form that needs nothing of ours."""
    with _failures():
        _alone("export")
        if format != "dense":
            raise typer.BadParameter(f"--format {format}: known is dense")
        from spectrim.model.export import export_dense

        export_dense(model, out, _dtype(dtype))
    out_console.print(f"dense weights written to {out}")


@app.command()
def methods(as_json: Json = False) -> None:
    """List the recipes, decomposers, allocators and ways of tuning."""
    with _failures():
        from spectrim import recipe as recipes
        from spectrim.core import registry
        from spectrim.core.finetuner import finetuners

        tables = {
            "recipe": recipes.shipped(),
            "decomposer": {n: (c.__doc__ or "").split("\n")[0] for n, c in registry.decomposers().items()},
            "allocator": {n: (c.__doc__ or "").split("\n")[0] for n, c in registry.allocators().items()},
            "finetune": {n: (c.__doc__ or "").split("\n")[0] for n, c in finetuners().items()},
        }
    if as_json:
        show.as_json(tables)
        return
    show.methods(tables)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Keep the compressed model here.")] = None,
    ratio: Annotated[float, typer.Option("--ratio", help="Fraction of the targets' parameters to remove.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Compress the bundled model, measure it before and after, and let both write."""
    with _failures(), show.bars() as progress:
        _alone("demo")
        from spectrim import commands

        report = commands.demo(out, ratio, progress)
    if as_json:
        show.as_json(report)
        return
    show.demo(report, ratio)
