"""compress(): the stages in order: targets, calibrate, decompose, allocate, apply, save."""

from __future__ import annotations

import logging
import platform
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from spectrim import finished, needs, owntext, recovery, searching, sizes
from spectrim import recipe as recipes
from spectrim.core import distributed, heap, lock
from spectrim.core.plan import Plan
from spectrim.core.progress import Progress, silent
from spectrim.core.store import Store, StoreError, appears, hash_of, write_json
from spectrim.data import text as texts
from spectrim.jobs import Job
from spectrim.measure.evaluate import max_positions, parameters
from spectrim.model import apply, blocks, targets, writer
from spectrim.model.checkpoint import Checkpoint, LiveModel, Weights
from spectrim.model.files import read_tokenizer, resolve
from spectrim.recipe import Recipe
from spectrim.run import Run, Timings
from spectrim.settling import of_a_process
from spectrim.starting import DEFAULT_LENGTH, Start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What compress() made: the plan, `spectrim.json` and `run.json`, and where it is (a directory or a live model)."""

    plan: Plan
    summary: dict[str, Any]
    run: dict[str, Any]
    directory: Path | None = None
    model: PreTrainedModel | None = None


@heap.small()
def compress(
    model: str | Path | PreTrainedModel,
    recipe: str | Recipe = "default",
    ratio: float | None = None,
    text: str | Sequence[str] | Int[Tensor, "sequences length"] | None = None,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    format: str | None = None,
    tokens: int | float | None = None,
    work: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    settings: Sequence[str] = (),
    memory: str | int | None = None,
    budget: str | int | None = None,
    parameters: int | float | None = None,
    max_loss: int | float | None = None,
    measure: bool = False,
    progress: Progress = silent,
) -> Result:
    """Compress a model directory (or hub name) into `out`, or a live model in place.

    ratio: fraction of the targets' parameters to remove; or else budget: bytes of the files written, parameters: of
    the whole model, max_loss: nats a token over the dense model, all three at most (`sizes`, `searching`). measure:
    have `run.json` say what is lost on windows of `accept`, or `select`. tokens: of the text, to tune on where the
    recipe tunes. text: files or dataset names, `NAME=WEIGHT` for a mixture (with `tokenizer` for a live model),
    `self` for what the model writes, or token windows; needed where the recipe measures anything. work: where
    statistics and decompositions are kept for the next run (default `out`.work); without `out`, a live model's are
    kept only if given. memory: what the run may hold beside its imports (`6GB`, `512MiB`, bytes): hidden states
    that do not fit lie in files in the work directory, and a killed run goes on at its block. Several processes of
    torchrun, given the same, share the work, and all return the result. Raises ValueError (and RecipeError,
    StoreError) before anything heavy for bad input, a limit that is too low, or a disk that is too full;
    RecipeError for a size that no ratio gives; distributed.Lost where another process failed.
    """
    # over 50 lines for its signature and docstring: what follows is the whole flow, each step in a module of its own
    shortcuts = {"ratio": ratio, "sequences": sequences, "length": length, "seed": seed, "format": format}
    shortcuts["tokens"] = tokens
    device = torch.device(device)
    distributed.join(device)
    timings, available = Timings(), of_a_process()
    with distributed.alike():
        device = distributed.own(device)
        size = sizes.asked_for(ratio, budget, parameters, max_loss)
        asked = sizes.with_windows(recipes.build(recipe, shortcuts, settings), size)
        wish = sizes.wish_of(asked, size, measure)
        limit = None if memory is None else needs.parse_size(memory)
        with timings.stage("read"):
            source = _source(model, out, device, overwrite, trust_remote_code, asked, wish)
            device = source.model.device if isinstance(source, LiveModel) else device
            text = "reference" if text is None and model == "reference" else text
            tokenizer = _tokenizer(source, text, tokenizer, trust_remote_code)
        with timings.stage("targets"):
            structure = blocks.share_inputs(source.model, targets.find(source.model))
            aim = sizes.aimed(asked, size, source, structure, dtype)
            asked = asked if aim is None else sizes.scaled(asked, aim.first() / sizes.GRID)
            start = Start(source, structure, text, limit, out, available)
            begun = start.begun(asked)
    with _store(work, out) as store, nullcontext() if limit is None else heap.small(heap.TIGHT):
        with distributed.alike():
            shown = progress if distributed.first() else silent
            with timings.stage("text"):
                own = owntext.own_text(source, asked.calibrate, text, device)
                measured = max_loss is not None or (measure and text is not None)
                windows = _windows(asked, begun.jobs, text, tokenizer, source.model, store, measured, own, shown)
                if max_loss is not None and windows is not None:
                    searching.refuse_few(windows, asked.calibrate)
            known = None if own is None else own.fingerprint
            structure = begun.setting.structure
            run = Run(source, structure, asked, begun.jobs, windows, device, store, timings, shown, dtype, known)
            _check_same(run, out)
            tuning = recovery.ready(run, text, tokenizer, trust_remote_code)
        made = distributed.agreed(lambda: finished.compressed(run, out, overwrite, wish))
        if made is not None:
            recovery.put_away(tuning)
            return Result(*made, directory=Path(str(out)))
        request = None if out is None else finished.request_of(run, wish)
        first = start.ready(run, begun)
        found = searching.Search(first, size, aim, lambda other: start.again(run, other), measure).go()
        if tuning is None:
            return _finish(found, out, overwrite, request, wish)
        tuning = replace(tuning, run=found.run, request=request)  # at the ratio that was found
        untuned = _finish(found, tuning.untuned, True, request, wish)
        made = tuning.go(untuned.plan, untuned.summary, untuned.run, Path(str(out)), overwrite)
        return Result(*made, directory=Path(str(out)))


def _tokenizer(source: Weights, text: Any, given: Any, trust_remote_code: bool) -> Any:
    """The one that was given, else that of a checkpoint where a text has to be read."""
    if given is not None or not isinstance(source, Checkpoint) or not owntext.needs_tokenizer(text):
        return given
    return read_tokenizer(source.directory, trust_remote_code)


def _check_same(run: Run, out: str | Path | None) -> None:
    """Raise ValueError where processes of one run were given different things."""
    distributed.same(
        {
            "the recipe": hash_of(run.asked.model_dump()), "the model's weights": run.fingerprint,
            "the calibration text": run.data or "", "the device": run.device.type, "the output": str(out),
            "the dtype": str(run.dtype), "the work directory": str(run.store.directory),
            "the methods, by the limit on memory": hash_of(run.decomposers),
        }
    )  # fmt: skip


def _source(
    model: str | Path | PreTrainedModel,
    out: str | Path | None,
    device: str | torch.device,
    overwrite: bool,
    trust_remote_code: bool,
    asked: Recipe,
    wish: Mapping[str, Any],
) -> Weights:
    """Where the weights come from. Raises ValueError unless a directory has an `out` that can be written."""
    if isinstance(model, PreTrainedModel):
        if out is not None:
            raise ValueError("a live model is compressed in place: save it with spectrim.save(model, directory)")
        source = LiveModel(model)
        if model.device.type != torch.device(device).type:
            raise ValueError(f"the model is on {model.device}, the run on {device}: give device={str(model.device)!r}")
        return source
    if out is None:
        raise ValueError("give `out`, the directory to write the compressed model into")
    finished.refuse_filled(Path(out), overwrite, finished.of_recipe(asked, wish))
    return Checkpoint(resolve(str(model)), compute_dtype(device), trust_remote_code)


@contextmanager
def _store(work: str | Path | None, out: Path | str | None) -> Iterator[Store]:
    """The work directory, which no other run may use meanwhile; a temporary one for a live model without `work`."""
    with ExitStack() as stack:
        with distributed.alike():
            if work is None and out is None:
                directory = Path(distributed.agreed(lambda: stack.enter_context(_temporary())))
                store = Store(directory)
            else:
                store = Store(Path(work if work is not None else f"{out}.work"))
                alone = stack.enter_context(lock.held(store.directory))
                if alone:
                    store.tidy()
        _check_shared(store.directory)
        yield store


@contextmanager
def _temporary() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="spectrim-") as folder:
        yield folder


def _check_shared(directory: Path) -> None:
    """Raise StoreError where not all processes see the work directory."""
    if distributed.world() == 1:
        return
    with ExitStack() as stack:

        def mark() -> str:
            directory.mkdir(parents=True, exist_ok=True)
            return Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-")).name).name

        name = distributed.agreed(mark)
        seen = distributed.gathered(None if appears(directory / name) else socket.gethostname())
    blind = [f"process {number} on {host}" for number, host in enumerate(seen) if host is not None]
    if blind:
        raise StoreError(
            f"{', '.join(blind)} cannot see {directory}: the work directory must lie on a file system that all "
            "machines share; give one with --work"
        )


def compute_dtype(device: str | torch.device) -> torch.dtype | None:
    """The dtype calibration runs in: float32 on a CPU, where half types are slower and rougher; else as stored."""
    return torch.float32 if torch.device(device).type == "cpu" else None


def _windows(
    asked: Recipe,
    jobs: Sequence[Job],
    text: Any,
    tokenizer: Any,
    model: PreTrainedModel,
    store: Store,
    lost: bool,
    own: owntext.OwnText | None,
    progress: Progress,
) -> Int[Tensor, "sequences length"] | None:
    """The calibration tokens, or None when nothing is measured. Raises ValueError when text is needed and missing."""
    wanted = {repr(n) for job in jobs for d in [*job.decomposers.values(), job.allocator] for n in d.needs}
    wanted |= {"deviations of the model" for job in jobs if job.allocator.sees == "model"}
    wanted |= {"the dense model's outputs"} if asked.calibrate.paired else set()
    wanted |= {"what the result loses"} if lost else set()
    wanted |= {"the loss of its tuning"} if asked.tune is not None else set()
    if not wanted:
        return None
    longest = max_positions(model)
    length = asked.calibrate.length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
    if isinstance(text, Tensor):
        _check_windows(text, model)
        length = text.shape[1]
    if longest is not None and length > longest:
        raise ValueError(f"calibration length {length} exceeds the model's maximum of {longest} positions")
    if isinstance(text, Tensor):
        return text
    if text is None:
        raise ValueError(f"this recipe measures {', '.join(sorted(wanted))} on calibration text: give --text FILE")
    if tokenizer is None and owntext.needs_tokenizer(text):
        raise ValueError("give the tokenizer too, or token windows as `text`")
    sources = [texts.parse_source(name) for name in ([text] if isinstance(text, str) else text)]
    settings = asked.calibrate
    key = {
        "text": texts.fingerprint(sources), "tokenizer": "" if tokenizer is None else _tokenizer_hash(tokenizer),
        "sequences": settings.sequences, "length": length, "seed": settings.seed,
        **({} if own is None else own.key(length)),
    }  # fmt: skip
    drawn = None if own is None else lambda count: own.draw(count, length, progress)

    def make() -> None:
        if not store.has("windows", key):
            windows = texts.sample_windows(sources, tokenizer, settings.sequences, length, settings.seed, drawn)
            _check_windows(windows, model)
            store.save("windows", key, {"ids": windows})

    distributed.agreed(make)
    return store.load("windows", key)["ids"]


def _check_windows(windows: Tensor, model: PreTrainedModel) -> None:
    """Raise ValueError for windows that are no token ids, sequences × length, of this model."""
    if windows.ndim != 2 or windows.is_floating_point() or windows.numel() == 0:
        kind = f"{str(windows.dtype).removeprefix('torch.')} of shape {tuple(windows.shape)}"
        raise ValueError(f"no calibration windows: {kind}, not token ids, sequences × length")
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    vocabulary, largest = embedding.shape[0], int(windows.max())
    if int(windows.min()) < 0 or largest >= vocabulary:
        wrong = largest if largest >= vocabulary else int(windows.min())
        raise ValueError(f"token {wrong} is not in the model's vocabulary of {vocabulary}: is the tokenizer its own?")


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that decides the tokens of a text: a fast tokenizer's whole state, else class and vocabulary."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    state = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    return hash_of({"class": type(tokenizer).__name__, "state": state, "special": tokenizer.special_tokens_map})


def _finish(
    found: searching.Found, out: str | Path | None, overwrite: bool, request: str | None, wish: Mapping[str, Any]
) -> Result:
    """Apply the plan, write what was asked, and say what came of it."""
    run, plan, candidates = found.run, found.plan, found.candidates
    if out is None:
        model = run.source.model
        before = parameters(model)
        with run.timings.stage("write"):
            apply.live(model, run.structure, plan, candidates, run.progress)
        summary = _summary(run, plan, before["total"], parameters(model)["total"])
        return Result(plan, {**summary, **wish}, {**_facts(run), **found.facts}, model=model)
    source, final = run.source, Path(out)
    assert isinstance(source, Checkpoint)
    with ExitStack() as stack:
        directory = distributed.agreed(lambda: stack.enter_context(writer.new_directory(final, overwrite)))
        with distributed.alike(), run.timings.stage("write"):
            own = directory if distributed.first() else None
            apply.streamed(source, run.structure, plan, candidates, own, run.dtype, progress=run.progress)

        def described() -> tuple[dict[str, Any], dict[str, Any]]:
            before, after = parameters(source.directory), parameters(directory)
            summary, facts = _summary(run, plan, before["total"], after["total"]), _facts(run)
            assert request is not None
            summary |= {**wish, **finished.record(directory, request)}
            facts |= found.facts
            write_json(directory / "spectrim.json", summary)
            write_json(directory / "run.json", facts)
            return summary, facts

        summary, facts = distributed.agreed(described)
    distributed.barrier()  # the first process has put it in its place
    return Result(plan, summary, facts, directory=final)


def _summary(run: Run, plan: Plan, total_before: int, total_after: int) -> dict[str, Any]:
    dense = sum(target.parameters for job in run.jobs for target in job.targets)
    asked = run.asked.model_dump(exclude_none=True)
    return {
        "ratio_requested": 1 - plan.budget / dense if len(run.jobs) > 1 else run.asked.groups[0].ratio,
        "ratio_actual": 1 - plan.spent / dense,
        "ratio_of_model": 1 - total_after / total_before,
        "parameters": {
            "targets_before": dense,
            "targets_after": plan.spent,
            "total_before": total_before,
            "total_after": total_after,
        },
        "recipe": asked,
        "recipe_hash": hash_of(asked),
        "seed": run.asked.calibrate.seed,
        "calibration": None if run.windows is None else {"shape": list(run.windows.shape), "sha256": run.data},
        "versions": {name: version(name) for name in ("spectrim", "torch", "transformers", "safetensors")},
        "plan": plan.to_json(),
    }


def _facts(run: Run) -> dict[str, Any]:
    return {
        "hardware": {
            "machine": platform.machine(),
            "device": str(run.device) if run.device.type == "cpu" else torch.cuda.get_device_name(run.device),
            "threads": torch.get_num_threads(),
            "processes": distributed.world(),
        },
        "timings": {name: round(seconds, 4) for name, seconds in run.timings.seconds.items()},
        "peak_rss_bytes_until": run.timings.peaks,
        "peak_rss_bytes": heap.peak(),
    }
