"""The loop that tunes a model: transformers' Trainer around a session, with distillation, and resumed exactly.

A checkpoint of it holds what is trained and nothing else of the model, the session's state, and what the Trainer keeps:
the optimizer's state, the scheduler's, random states, the history.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from spectrim.core import heap
from spectrim.core.finetuner import Session
from spectrim.core.progress import Progress, silent
from spectrim.data.instructions import IGNORED, Row, collate
from spectrim.learn.losses import Distillation, Micro

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
TRAINED, STATE, COMPLETE = "trained.safetensors", "session.safetensors", "complete"


@dataclass(frozen=True)
class Training:
    """How long and how: the words of transformers' TrainingArguments where they have one.

    steps: moves of the optimizer, or `epochs` over the rows (1 if neither is given). batch_size: rows of a step, over
    all processes; micro_batch_size: rows of one forward pass of one process (None: as many as the batch leaves it).
    learning_rate: None is the method's own. save_steps is rounded up to a multiple of logging_steps. precision: auto is
    bfloat16 on a GPU and float32 on a CPU.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 100
    logging_steps: int = 10
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: give one of them")
        for name in (
            "steps",
            "epochs",
            "batch_size",
            "micro_batch_size",
            "save_steps",
            "logging_steps",
            "max_grad_norm",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: it must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}: the share of the steps is in [0, 1)")

    def accumulated(self, processes: int) -> tuple[int, int]:
        """Rows of one forward pass, and how many of these make a step. ValueError where rows do not share out."""
        share, rest = divmod(self.batch_size, processes)
        micro = self.micro_batch_size or share
        if rest or share == 0 or share % micro:
            raise ValueError(
                f"batch_size {self.batch_size} does not share out over {processes} processes in passes of {micro or 1} "
                "rows: choose batch_size = processes × micro_batch_size × a whole number"
            )
        return micro, share // micro

    def length(self, rows: int) -> int:
        """Steps, of that many rows."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((1.0 if self.epochs is None else self.epochs) * rows / self.batch_size))


class Rows(Dataset[Row]):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def rows_hash(rows: Sequence[Row], pad: int) -> str:
    """What tells rows from others in a key: every token and label, so the tokenizer that made them is in it."""
    digest = hashlib.sha256(str(pad).encode())
    for row in rows:
        for tensor in (row.ids, row.labels):
            digest.update(len(tensor).to_bytes(8, "little"))
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Hooks(TrainerCallback):
    """Tells the session where the loop is, and the user."""

    def __init__(self, session: Session, progress: Progress, stage: str) -> None:
        self.session, self.progress, self.stage = session, progress, stage

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.before(state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.moved(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        heap.give_back()  # what a step freed lies between adapters, and the next step would grow beside it
        self.progress(self.stage, state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _Trainer(Trainer):
    """A Trainer whose loss is the session's, and that saves what is trained alone."""

    def __init__(self, session: Session, teacher: nn.Module | None, distillation: Distillation, **options: Any) -> None:
        super().__init__(model=session.model, **options)
        self.session, self.teacher, self.distillation = session, teacher, distillation
        self.remove_callback(PrinterCallback)  # stdout is the command line's
        self.model_accepts_loss_kwargs = True  # the loss is a mean over the whole step: nothing is left to divide

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        count = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = Micro(model, inputs, num_items_in_batch.clamp_min(1), self.teacher, self.distillation)
        loss = self.session.loss(batch)
        if not bool(loss.isfinite()):
            raise Diverged(_diverged(float(loss.detach()), self.state.global_step, self.args))
        return loss * self.accelerator.num_processes  # gradients of processes are averaged, the loss is a sum

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self.session.differentiated(self.state.global_step, self.state.max_steps)
        return super()._clip_grad_norm(model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer's; where the session says so, with a rate of its own for each parameter."""
        scales = self.session.scales()
        if scales and self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            rate, decayed = self.args.learning_rate, self.get_decay_parameter_names(self.session.model)
            groups = [
                {
                    "params": [parameter], "lr": rate * scales.get(name, 1.0),
                    "weight_decay": self.args.weight_decay if name in decayed else 0.0,
                }
                for name, parameter in trained(self.session.model).items()
            ]  # fmt: skip
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(*args, **kwargs)

    def _get_learning_rate(self) -> float:
        """What is logged: the rate that was asked for, at this step, not the first parameter's own."""
        scales = self.session.scales()
        first = scales.get(next(iter(trained(self.session.model))), 1.0) if scales else 1.0
        return float(super()._get_learning_rate()) / first

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_trained(self.session, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.session, Path(resume_from_checkpoint))


class Diverged(ValueError):
    """The loss of a training is not finite."""


def _diverged(loss: float, step: int, arguments: TrainingArguments) -> str:
    reason = (
        "float16 overflows above 65504: use precision=bfloat16, which has the range of float32"
        if arguments.fp16
        else "lower learning_rate, or look for rows that the model fails on"
    )
    return f"the loss is {loss} at step {step + 1}: {reason}. Steps up to the last checkpoint are kept"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that want gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_trained(session: Session, folder: Path) -> None:
    """Write what is trained, and the session's state."""
    parameters = {name: p.detach().cpu().contiguous() for name, p in trained(session.model).items()}
    save_file(parameters, folder / TRAINED)
    save_file({name: t.detach().cpu().contiguous() for name, t in session.state().items()}, folder / STATE)


@torch.no_grad()
def load_trained(session: Session, folder: Path) -> None:
    """Read them back, in place."""
    saved, parameters = load_file(folder / TRAINED), trained(session.model)
    if saved.keys() != parameters.keys():
        raise ValueError(f"{folder} holds other parameters than those that are tuned now: remove it to start again")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
    session.restore(load_file(folder / STATE))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; unfinished ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / COMPLETE).exists():
            logger.warning("%s was not written to its end: removed", path)
            shutil.rmtree(path)
    whole = [path for path in found if path.exists()]
    return whole[-1] if whole else None


def tune(
    session: Session,
    rows: Sequence[Row],
    pad: int,
    settings: Training,
    steps: int,
    folder: Path,
    device: torch.device,
    *,
    learning_rate: float,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    progress: Progress = silent,
    stage: str = "tune",
) -> list[dict[str, Any]]:
    """Train a session for that many steps; the history, one entry a logged step.

    Checkpoints lie in `folder`; where it holds a whole one the training goes on from there, to the same result. Raises
    Diverged for a loss that is not finite, with the step.
    """
    arguments = _arguments(settings, steps, folder, device, learning_rate)
    trainer = _Trainer(
        session, teacher, distillation or Distillation(), args=arguments, train_dataset=Rows(rows),
        data_collator=_collator(pad), callbacks=[_Hooks(session, progress, stage)],
    )  # fmt: skip
    found = latest(folder)
    if found is not None:
        logger.warning("tuning goes on from %s", found)
    if settings.gradient_checkpointing:
        session.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    try:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    finally:
        if settings.gradient_checkpointing:
            session.model.gradient_checkpointing_disable()  # type: ignore[operator]
    return list(trainer.state.log_history)


def _collator(pad: int) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
    return lambda rows: collate(rows, pad)


def _arguments(
    settings: Training, steps: int, folder: Path, device: torch.device, learning_rate: float
) -> TrainingArguments:
    """The Trainer's own settings."""
    from accelerate import PartialState

    micro, accumulation = settings.accumulated(PartialState(cpu=device.type == "cpu").num_processes)
    logged = min(settings.logging_steps, steps)
    kind = settings.precision
    if kind == "auto":
        kind = "bfloat16" if device.type == "cuda" else "float32"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation, learning_rate=learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type, warmup_steps=round(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm, seed=settings.seed,
        data_seed=settings.seed, bf16=kind == "bfloat16", fp16=kind == "float16",
        save_strategy="steps", save_total_limit=2, logging_steps=logged,
        # a loss is logged as a mean since the last one: a checkpoint in between would lose half of it
        save_steps=math.ceil(settings.save_steps / logged) * logged, report_to=list(settings.report_to) or "none",
        use_cpu=device.type == "cpu", remove_unused_columns=False, disable_tqdm=True, optim="adamw_torch",
        dataloader_pin_memory=device.type == "cuda",
    )  # fmt: skip
    if arguments.n_gpu > 1:  # one process drives one device; several are several processes
        arguments._n_gpu = 1
    return arguments
