"""tune(): the second half: read, check, train in one or more stages, merge, save."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from spectrim import finished
from spectrim.core import distributed, heap, registry
from spectrim.core.finetuner import Finetuner, finetuners
from spectrim.core.progress import Progress, silent
from spectrim.core.store import hash_of, write_json
from spectrim.data import instructions
from spectrim.data.instructions import Row
from spectrim.finetune import start as starts
from spectrim.learn import tuning
from spectrim.learn.losses import Distillation
from spectrim.learn.tuning import Training
from spectrim.measure.evaluate import parameters, positions
from spectrim.model import loading
from spectrim.model.checkpoint import moved, quiet
from spectrim.model.files import file_hash, read_config, read_tokenizer, resolve, weight_files
from spectrim.model.writer import new_directory, refuse_filled
from spectrim.recipe import RecipeError, assign
from spectrim.run import Timings
from spectrim.saving import lowered, save

logger = logging.getLogger(__name__)

DEFAULT_WINDOW = 2048
# Activations come and go at every step: of pieces above this glibc's heap would hold as much again as is used.
TRAINING = 2**16
# Part of the key that checkpoints lie under: raise it when what they hold changes its meaning.
VERSION = 1


@dataclass(frozen=True)
class Data:
    """How a training file is read.

    kind: text, instructions, chat, or by what is in it (auto); window: tokens of a row at most, of a text exactly
    (None: the model's maximum, at most 2048); long: rows whose response exceeds it; field: of a text's rows.
    """

    kind: instructions.Kind = "auto"
    window: int | None = None
    long: instructions.Long = "error"
    field: str = "text"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise ValueError(f"window is {self.window}: a row has at least 2 tokens, one to predict the other from")


@dataclass(frozen=True)
class Start:
    """What is done to the factors before the first step.

    method: none; balanced: U√s and √s Vᵀ of each pair, the same product; refined: singular values to the power
    1 − blend (1 − exponent), `preserve`d in a norm (SVS, arXiv 2412.17387), which changes the model; dense: dense too.
    """

    method: Literal["none", "balanced", "refined"] = "none"
    exponent: float = 0.5
    blend: float = 1.0
    preserve: Literal["fro", "none", "spectral"] = "fro"
    dense: bool = False

    def apply(self, model: PreTrainedModel) -> Sequence[str]:
        """Do it; what was left alone and why."""
        if self.method == "balanced":
            return starts.balanced(model)
        if self.method == "refined":
            return starts.refined(model, self.exponent, self.blend, self.preserve, self.dense)
        return ()


@dataclass(frozen=True)
class Request:
    """All that decides the result beside the model and the data."""

    name: str
    method: Finetuner
    train: Training
    data: Data
    start: Start
    distill: Distillation

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        parts: dict[str, Any] = {"train": self.train, "data": self.data, "start": self.start, "distill": self.distill}
        assert is_dataclass(self.method)
        settings = {each.name: getattr(self.method, each.name) for each in fields(self.method)}
        return {"method": {"method": self.name, **settings}, **{name: asdict(part) for name, part in parts.items()}}

    @property
    def learning_rate(self) -> float:
        """The one asked for, else the method's."""
        return self.train.learning_rate or self.method.learning_rate


@dataclass(frozen=True)
class Tuned:
    """What tune() made: where, what it adds to `spectrim.json`, and `run.json`."""

    directory: Path
    record: dict[str, Any]
    run: dict[str, Any]


def requested(method: str, shortcuts: Mapping[str, Any], settings: Sequence[str] = ()) -> Request:
    """What was asked for; `settings` are `part.key=value`, with the parts method, train, data, start and distill.

    Raises RecipeError, naming the key, for anything unknown or out of range.
    """
    data: dict[str, Any] = {name: {} for name in ("method", "train", "data", "start", "distill")}
    for path, value in shortcuts.items():
        if value is not None:
            assign(data, path, value)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or path.partition(".")[0] not in data or "." not in path:
            raise RecipeError(f"--set {setting!r}: write it as part.key=value, with a part of {', '.join(data)}")
        try:
            assign(data, path, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is no YAML: {error}") from error
    parts = {"train": Training, "data": Data, "start": Start, "distill": Distillation}
    try:
        built = {name: registry.build("part", parts, name, data[name]) for name in parts}
        return Request(method, registry.build("way of tuning", finetuners(), method, data["method"]), **built)
    except ValueError as error:
        raise RecipeError(str(error)) from error


@heap.small(TRAINING)
def tune(
    model: str | Path,
    data: str,
    out: str | Path,
    method: str = "rank_preserving",
    *,
    dense: str | Path | None = None,
    teacher: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    window: int | None = None,
    seed: int | None = None,
    work: str | Path | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    settings: Sequence[str] = (),
    progress: Progress = silent,
) -> Tuned:
    """Tune a compressed model directory on a text or on instructions, and write the tuned one to `out`.

    data: a file or dataset name (see `spectrim.data.instructions.rows`). method: one of `finetuners()`. dense: the
    second model of methods that need one. teacher: a dense model to learn from, by KL divergence. steps, epochs, …:
    shortcuts to `settings`. work: where checkpoints lie meanwhile (default `out`.work): the same command goes on from
    the last one.
    Raises ValueError (RecipeError for settings) for bad input, before anything heavy where it can be seen then.
    """
    shortcuts = {
        "train.steps": steps, "train.epochs": epochs, "train.batch_size": batch_size,
        "train.learning_rate": learning_rate, "train.seed": seed, "data.window": window,
    }  # fmt: skip
    asked = requested(method, shortcuts, settings)
    finished.refuse_filled(Path(out), overwrite, lambda summary: "finetuning" in summary)
    run = Tuning(
        asked, _directory(model, trust_remote_code), Path(out), torch.device(device), trust_remote_code, progress
    )
    run.check(dense, teacher)
    with run.timings.stage("data"):
        run.read(data)
    folder = Path(work or f"{out}.work")
    return run.answered(folder, overwrite) or run.finish(run.trained(folder), overwrite)


def _directory(model: str | Path, trust_remote_code: bool) -> Path:
    directory = resolve(str(model))
    read_config(directory, trust_remote_code)
    weight_files(directory)
    return directory


class Tuning:
    """One tuning under way."""

    def __init__(
        self, asked: Request, directory: Path, out: Path, device: torch.device, trust: bool, progress: Progress
    ) -> None:
        self.asked, self.directory, self.out, self.device = asked, directory, out, device
        self.trust, self.progress, self.timings = trust, progress, Timings()
        self.config = read_config(directory, trust)
        kind = self.config.dtype
        self.stored = kind if isinstance(kind, torch.dtype) else torch.float32
        self.others: dict[str, Path] = {}
        self.rows: list[Row] = []
        self.pad = self.trainable = 0
        self.data = self.tokens = ""
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def check(self, dense: str | Path | None, teacher: str | Path | None) -> None:
        """Raise ValueError where the model, or one beside it, is not of the kind that is needed."""
        name, wants = self.asked.name, self.asked.method.wants
        layout = loading.read_layout(self.directory) if loading.is_compressed(self.directory) else {}
        factored = any(spec["format"] != "dense" for spec in layout.values())
        if wants == "factors" and not factored:
            raise ValueError(
                f"{self.directory} has no factors, which {name} tunes: compress it first (spectrim compress "
                f"{self.directory} --out SMALL), or tune it dense with PEFT"
            )
        if wants == "dense" and factored:
            raise ValueError(f"{self.directory} is compressed already, and {name} works on the dense model before that")
        if self.asked.method.beside != (dense is not None):
            raise ValueError(
                f"{name} needs the dense model that this one was made from: give --dense DIR"
                if dense is None
                else f"--dense is given, but {name} uses no second model"
            )
        for key, model in (("dense", dense), ("teacher", teacher)):
            if model is not None:
                self.others[key] = _directory(model, self.trust)
        if self.asked.train.precision == "float16" and self.device.type == "cpu":
            raise ValueError("precision=float16 needs a GPU: use float32 or bfloat16")
        if teacher is None and self.asked.distill != Distillation():
            raise ValueError("settings of the distillation are given, but no model to learn from: give --teacher DIR")

    def read(self, name: str) -> None:
        """Read the rows."""
        tokenizer = read_tokenizer(self.directory, self.trust)
        longest, wanted = positions(self.config), self.asked.data
        window = wanted.window or min(DEFAULT_WINDOW, longest or DEFAULT_WINDOW)
        if longest is not None and window > longest:
            raise ValueError(f"window {window} exceeds the model's maximum of {longest} positions")
        self.rows = instructions.rows(name, tokenizer, window, wanted.kind, wanted.long, wanted.field)
        self.pad, self.data = instructions.pad_of(tokenizer), instructions.fingerprint(name, wanted.field)
        self.tokens = tuning.rows_hash(self.rows, self.pad)

    def answered(self, work: Path, overwrite: bool) -> Tuned | None:
        """What the output holds if it is the result of this very command; its checkpoints, if any are left, go.

        Raises ValueError for an output with anything else in it, which is not to be overwritten.
        """
        found = None if overwrite or not self.out.exists() else finished.answer(self.out, self.request())
        if found is None:
            refuse_filled(self.out, overwrite)
            return None
        logger.warning("%s holds the result of this command already; with --overwrite it is made anew", self.out)
        if distributed.rank() == 0:
            shutil.rmtree(work / f"tune-{self.key()}", ignore_errors=True)
        return Tuned(self.out, found["finetuning"][-1], finished.facts(self.out))

    def trained(self, work: Path) -> PreTrainedModel:
        """The tuned model, merged."""
        with self.timings.stage("load"):
            model = self.load(self.directory)
            others = {key: self.load(path) for key, path in self.others.items()}
        self.notes += self.asked.start.apply(model)
        folder = work / f"tune-{self.key()}"
        generator = torch.Generator().manual_seed(self.asked.train.seed)
        steps, stages = self.asked.train.length(len(self.rows)), self.asked.method.stages
        if steps < stages:
            raise ValueError(f"{steps} steps are fewer than the {stages} stages of {self.asked.name}")
        for stage in range(stages):
            session = self.asked.method.begin(model, stage, generator, others.get("dense"))
            _widen(session.model)
            self.trainable = max(self.trainable, sum(p.numel() for p in tuning.trained(session.model).values()))
            name = "tune" if stages == 1 else f"tune, stage {stage + 1}"
            share = steps // stages + (stage < steps % stages)
            with self.timings.stage(name):
                self.stage(session, share, folder / f"stage-{stage}", others.get("teacher"), name)
                model = session.finish().requires_grad_(False)
        self.folder = folder
        return model.eval()

    def stage(self, session: Any, steps: int, folder: Path, teacher: Any, name: str) -> None:
        """Train one session, or take what a run before this one came to."""
        done, history = folder / "done", folder / "history.json"
        if (done / tuning.COMPLETE).exists():
            tuning.load_trained(session, done)
            self.history += json.loads(history.read_text(encoding="utf-8"))
            return
        logs = tuning.tune(
            session, self.rows, self.pad, self.asked.train, steps, folder, self.device,
            learning_rate=self.asked.learning_rate, teacher=teacher, distillation=self.asked.distill,
            progress=self.progress, stage=name,
        )  # fmt: skip
        kept = [
            {key: log[key] for key in ("step", "loss", "learning_rate", "grad_norm")} for log in logs if "loss" in log
        ]
        if distributed.rank() == 0:
            done.mkdir(exist_ok=True)
            tuning.save_trained(session, done)
            write_json(history, kept)
            (done / tuning.COMPLETE).touch()
        self.history += kept

    def load(self, directory: Path) -> PreTrainedModel:
        """A model to compute with, its parameters frozen: float32 on a CPU or if asked for, else as stored."""
        wide = self.device.type == "cpu" or self.asked.train.precision == "float32"
        with quiet():
            model = loading.load(directory, dtype=torch.float32 if wide else "auto", trust_remote_code=self.trust)
        heap.give_back()
        return moved(model, self.device).requires_grad_(False).eval()

    def key(self) -> str:
        """Of all that decides the result."""
        models = {name: file_hash([*weight_files(path), path / "config.json"]) for name, path in self.others.items()}
        asked = self.asked.to_json()
        asked["train"] = {k: v for k, v in asked["train"].items() if k not in ("save_steps", "report_to")}
        return hash_of(
            {
                "version": VERSION, "asked": asked, "data": self.data, "rows": self.tokens, "others": models,
                "device": self.device.type,
                "model": file_hash([*weight_files(self.directory), self.directory / "config.json"]),
                "versions": {name: version(name) for name in ("spectrim", "torch", "transformers")},
            }
        )[:16]  # fmt: skip

    def request(self) -> str:
        """Of all that decides what is written."""
        return hash_of({"tuning": self.key(), "beside": finished.beside(self.directory), "stored": str(self.stored)})

    def finish(self, model: PreTrainedModel, overwrite: bool) -> Tuned:
        """Save the model, its record and what run it took; the checkpoints go."""
        with self.timings.stage("write"):
            model = lowered(model, self.stored)
            tokens = sum(int((row.labels[1:] != instructions.IGNORED).sum()) for row in self.rows)
            record = {
                **self.asked.to_json(), "learning_rate": self.asked.learning_rate, "data_sha256": self.data,
                "rows": len(self.rows), "predictions": tokens, "steps": self.asked.train.length(len(self.rows)),
                "trainable_parameters": self.trainable, "parameters_before": parameters(self.directory)["total"],
                "parameters_after": parameters(model)["total"], "notes": list(self.notes), "history": self.history,
                "versions": {name: version(name) for name in ("spectrim", "torch", "transformers")},
            }  # fmt: skip
            facts = {
                "hardware": {"device": str(self.device), "threads": torch.get_num_threads()},
                "timings": {name: round(seconds, 4) for name, seconds in self.timings.seconds.items()},
                "peak_rss_bytes": heap.peak(),
            }
            if distributed.rank() == 0:
                with new_directory(self.out, overwrite) as directory:
                    save(model, self.directory, directory, record, facts, self.request())
                shutil.rmtree(self.folder)
        # as it reads in the file: with lists for tuples
        return Tuned(self.out, json.loads(json.dumps(record)), facts)


def _widen(model: nn.Module) -> None:
    """What is trained in float32, whatever the rest is: small steps vanish in half precision."""
    for parameter in tuning.trained(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
