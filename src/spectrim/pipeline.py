"""compress(): the stages in order: targets, calibrate, decompose, allocate, apply, save."""

from __future__ import annotations

import hashlib
import logging
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from spectrim import recipe as recipes
from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.calibrate.resident import resident
from spectrim.calibrate.streamed import streamed
from spectrim.core import budget, heap
from spectrim.core import plan as plans
from spectrim.core.plan import Candidate, Plan, Target, Units
from spectrim.core.progress import Progress, silent
from spectrim.core.store import Store, hash_of, write_json
from spectrim.data import text as texts
from spectrim.jobs import Job, allocate, allocate_early, plan_jobs
from spectrim.measure.evaluate import max_positions, parameters
from spectrim.model import apply, blocks, targets, writer
from spectrim.model.blocks import Batch
from spectrim.model.checkpoint import Checkpoint, LiveModel, Weights
from spectrim.model.files import resolve
from spectrim.recipe import Recipe

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Result:
    """What compress() made: the plan, `spectrim.json` and `run.json`, and where it is (a directory or a live model)."""

    plan: Plan
    summary: dict[str, Any]
    run: dict[str, Any]
    directory: Path | None = None
    model: PreTrainedModel | None = None


@dataclass
class Timings:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    work: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    settings: Sequence[str] = (),
    progress: Progress = silent,
) -> Result:
    """Compress a model directory (or hub name) into `out`, or a live model in place.

    ratio: fraction of the targets' parameters to remove. text: files or dataset names, `NAME=WEIGHT` for a mixture
    (with `tokenizer` for a live model), or token windows; needed where the recipe measures anything. work: where
    statistics and decompositions are kept for the next run (default `out`.work); without `out`, a live model's are
    kept only if given. Raises ValueError (and RecipeError, StoreError) before anything heavy for bad input.
    """
    shortcuts = {"ratio": ratio, "sequences": sequences, "length": length, "seed": seed, "format": format}
    asked = recipes.build(recipe, shortcuts, settings)
    timings = Timings()
    with timings.stage("read"):
        source = _source(model, out, device, overwrite, trust_remote_code)
        if text is None and model == "reference":
            text = "reference"
        if isinstance(source, Checkpoint) and tokenizer is None and text is not None and not isinstance(text, Tensor):
            tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
    with timings.stage("targets"):
        structure = blocks.share_inputs(source.model, targets.find(source.model))
        jobs = plan_jobs(asked, structure)
        early = [allocate_early(job, asked) for job in jobs]
    with _store(work, out) as store:
        with timings.stage("text"):
            windows = _windows(asked, jobs, text, tokenizer, source.model, store)
        run = _Run(source, structure, asked, jobs, windows, torch.device(device), timings, progress)
        candidates = run.candidates(store)
        with timings.stage("allocate"):
            chosen = [done or run.allocate(job, candidates, store) for done, job in zip(early, jobs, strict=True)]
            plan = replace(plans.merge(chosen), notes=structure.notes)
            store.save_json("plan", {"recipe": asked.model_dump(), "weights": run.fingerprint}, plan.to_json())
        return run.finish(plan, candidates, out, overwrite, dtype)


def _source(
    model: str | Path | PreTrainedModel,
    out: str | Path | None,
    device: str | torch.device,
    overwrite: bool,
    trust_remote_code: bool,
) -> Weights:
    """Where the weights come from. Raises ValueError unless a directory has an `out` that can be written."""
    if isinstance(model, PreTrainedModel):
        if out is not None:
            raise ValueError("a live model is compressed in place: save it with spectrim.save(model, directory)")
        return LiveModel(model)
    if out is None:
        raise ValueError("give `out`, the directory to write the compressed model into")
    writer.refuse_filled(Path(out), overwrite)
    return Checkpoint(resolve(str(model)), compute_dtype(device), trust_remote_code)


@contextmanager
def _store(work: str | Path | None, out: Path | str | None) -> Iterator[Store]:
    """The work directory; a temporary one for a live model without `work`."""
    import tempfile

    if work is not None:
        yield Store(Path(work))
    elif out is not None:
        yield Store(Path(f"{out}.work"))
    else:
        with tempfile.TemporaryDirectory(prefix="spectrim-") as folder:
            yield Store(Path(folder))


def compute_dtype(device: str | torch.device) -> torch.dtype | None:
    """The dtype calibration runs in: float32 on a CPU, where half types are slower and rougher; else as stored."""
    return torch.float32 if torch.device(device).type == "cpu" else None


def _windows(
    asked: Recipe, jobs: Sequence[Job], text: Any, tokenizer: Any, model: PreTrainedModel, store: Store
) -> Int[Tensor, "sequences length"] | None:
    """The calibration tokens, or None when nothing is measured. Raises ValueError when text is needed and missing."""
    wanted = {repr(n) for job in jobs for d in [*job.decomposers.values(), job.allocator] for n in d.needs}
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
    if tokenizer is None:
        raise ValueError("give the tokenizer too, or token windows as `text`")
    sources = [texts.parse_source(name) for name in ([text] if isinstance(text, str) else text)]
    settings = asked.calibrate
    key = {
        "text": texts.fingerprint(sources), "tokenizer": _tokenizer_hash(tokenizer),
        "sequences": settings.sequences, "length": length, "seed": settings.seed,
    }  # fmt: skip
    if not store.has("windows", key):
        windows = texts.sample_windows(sources, tokenizer, settings.sequences, length, settings.seed)
        _check_windows(windows, model)
        store.save("windows", key, {"ids": windows})
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


class _Run:
    """One run under way: what every stage reads."""

    def __init__(
        self,
        source: Weights,
        structure: targets.Structure,
        asked: Recipe,
        jobs: Sequence[Job],
        windows: Int[Tensor, "sequences length"] | None,
        device: torch.device,
        timings: Timings,
        progress: Progress,
    ):
        self.source, self.structure, self.asked, self.jobs = source, structure, asked, jobs
        self.windows, self.device, self.timings, self.progress = windows, device, timings, progress
        with timings.stage("fingerprint"):
            self.fingerprint = source.fingerprint()
        self.data = None if windows is None else hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
        self.decomposers = {name: d for job in jobs for name, d in job.decomposers.items()}
        self.formats = {target.name: job.format for job in jobs for target in job.targets}

    def _key(self, target: Target) -> dict[str, Any]:
        """What made a candidate: not the ratio, nor the allocator."""
        decomposer = self.decomposers[target.name]
        measured = {"text": self.data, "dtype": str(self.source.model.dtype)} if decomposer.needs else {}
        method = f"{type(decomposer).__module__}.{decomposer!r}"
        return {
            "weights": self.fingerprint, "target": asdict(target), "method": method,
            "format": self.formats[target.name], **measured,
        }  # fmt: skip

    def _block_key(self, index: int, statistic: Any) -> dict[str, Any]:
        return {
            "weights": self.fingerprint, "text": self.data, "block": self.structure.block(index),
            "statistic": repr(statistic), "dtype": str(self.source.model.dtype),
        }  # fmt: skip

    def candidates(self, store: Store) -> dict[str, Candidate]:
        """Every target's candidate, from the store or made now."""
        pending = [t for job in self.jobs for t in job.targets if not store.has("candidate", self._key(t))]
        if pending:
            logger.info("%d of %d decompositions to make", len(pending), len(self.decomposers))
        wanted = self._wanted(pending, store)
        total, made = len(pending), 0
        with self.timings.stage("calibrate"):
            for index, measured in self._drive(wanted):
                self._keep_block(index, measured, wanted[index] if index in wanted else Wanted(), store)
                for target in wanted.get(index, Wanted()).targets:
                    made += 1
                    self._decompose(target, measured, store)
                    self.progress("decompose", made, total)
            for target in pending:
                if not self.decomposers[target.name].needs:
                    made += 1
                    self._decompose(target, BlockStatistics({}, {}, {}), store)
                    self.progress("decompose", made, total)
        # decomposition runs inside the calibration's loop: count it once
        if "decompose" in self.timings.seconds:
            self.timings.seconds["calibrate"] -= self.timings.seconds["decompose"]
        return {target.name: self._stored(target, store) for job in self.jobs for target in job.targets}

    def _wanted(self, pending: Sequence[Target], store: Store) -> dict[int, Wanted]:
        """What to measure in each block: nothing for what the store has."""
        of_blocks = tuple(dict.fromkeys(n for job in self.jobs for n in job.allocator.needs))
        wanted = {}
        for index in range(self.structure.count):
            inside = {
                t: tuple(self.decomposers[t.name].needs)
                for t in pending
                if t.blocks[-1] == index and self.decomposers[t.name].needs
            }
            missing = tuple(s for s in of_blocks if not store.has("statistics", self._block_key(index, s)))
            if inside or missing:
                wanted[index] = Wanted(inside, missing)
        return wanted

    def _drive(self, wanted: Mapping[int, Wanted]) -> Iterator[tuple[int, BlockStatistics]]:
        if not wanted:
            return iter(())
        assert self.windows is not None
        tokens, widest = self.windows.numel(), max(p.in_features for t in self.structure.targets for p in t.parts)
        if tokens < widest:
            logger.warning(
                "%d calibration tokens for inputs of width %d: statistics are rank deficient", tokens, widest
            )
        batches = [Batch(ids) for ids in self.windows.split(self.asked.calibrate.batch)]
        if not any(s.needs_gradient for w in wanted.values() for chosen in w.targets.values() for s in chosen):
            return streamed(self.source, self.structure, batches, wanted, self.device, self.progress)
        model = self.source.whole(self.device)
        return resident(model, self.structure, batches, wanted, self.progress)

    def _keep_block(self, index: int, measured: BlockStatistics, wanted: Wanted, store: Store) -> None:
        for statistic in wanted.block:
            store.save("statistics", self._block_key(index, statistic), {"value": measured.block[statistic]})

    def _decompose(self, target: Target, measured: BlockStatistics, store: Store) -> None:
        with self.timings.stage("decompose"):
            weights = {module: w.to(self.device) for module, w in self._weights(target).items()}
            candidate = self.decomposers[target.name].decompose(target, weights, measured.of(target))
            (part,) = target.parts
            tensors = dict(candidate.tensors())
            largest = budget.largest_rank(self.formats[target.name], part)
            tensors["left"] = tensors["left"][:, :largest]
            for units in candidate.units:
                tensors[f"{units.kind}.scores"] = units.scores
                if units.errors is not None:
                    tensors[f"{units.kind}.errors"] = units.errors
            store.save("candidate", self._key(target), tensors)

    def _weights(self, target: Target) -> dict[str, Tensor]:
        """The dense matrices of a target, out × in, by module."""
        return {
            part.module: targets.oriented(
                self.source.model.get_submodule(part.module), self.source.read(f"{part.module}.weight")
            )
            for part in target.parts
        }

    def _stored(self, target: Target, store: Store) -> Candidate:
        key = self._key(target)
        values = store.load("candidate", key, ("rank.scores", "rank.errors"))
        (part,) = target.parts
        format = self.formats[target.name]
        units = Units("rank", values["rank.scores"], values.get("rank.errors"), budget.unit_cost(format, part))
        return Candidate(target, (units,), lambda: store.load("candidate", key), lambda: self._weights(target), format)

    def allocate(self, job: Job, candidates: Mapping[str, Candidate], store: Store) -> Plan:
        """The plan of a job whose allocator reads candidates and statistics of the blocks."""
        measured = {
            index: {s: store.load("statistics", self._block_key(index, s))["value"] for s in job.allocator.needs}
            for index in range(self.structure.count)
        }
        own = {target.name: candidates[target.name] for target in job.targets}
        return allocate(job, self.asked, candidates=own, statistics=measured)

    def finish(
        self,
        plan: Plan,
        candidates: Mapping[str, Candidate],
        out: str | Path | None,
        overwrite: bool,
        dtype: torch.dtype | None,
    ) -> Result:
        """Apply the plan, write what was asked, and say what came of it."""
        if out is None:
            model = self.source.model
            before = parameters(model)
            with self.timings.stage("write"):
                apply.live(model, self.structure, plan, candidates, self.progress)
            summary = self._summary(plan, before["total"], parameters(model)["total"])
            return Result(plan, summary, self._facts(), model=model)
        assert isinstance(self.source, Checkpoint)
        with writer.new_directory(Path(out), overwrite) as directory:
            with self.timings.stage("write"):
                apply.streamed(self.source, self.structure, plan, candidates, directory, dtype, progress=self.progress)
            before, after = parameters(self.source.directory), parameters(directory)
            summary, facts = self._summary(plan, before["total"], after["total"]), self._facts()
            write_json(directory / "spectrim.json", summary)
            write_json(directory / "run.json", facts)
        return Result(plan, summary, facts, directory=Path(out))

    def _summary(self, plan: Plan, total_before: int, total_after: int) -> dict[str, Any]:
        dense = sum(target.parameters for job in self.jobs for target in job.targets)
        asked = self.asked.model_dump(exclude_none=True)
        return {
            "ratio_requested": 1 - plan.budget / dense if len(self.jobs) > 1 else self.asked.groups[0].ratio,
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
            "seed": self.asked.calibrate.seed,
            "calibration": None if self.windows is None else {"shape": list(self.windows.shape), "sha256": self.data},
            "versions": {name: version(name) for name in ("spectrim", "torch", "transformers", "safetensors")},
            "plan": plan.to_json(),
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "hardware": {
                "machine": platform.machine(),
                "device": str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
                "threads": torch.get_num_threads(),
            },
            "timings": {name: round(seconds, 4) for name, seconds in self.timings.seconds.items()},
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
