"""The tuning that a recipe asks for (`tune:`): what was compressed learns from the dense model, on the same text.

The loss is KL(dense ‖ compressed) on windows of the calibration text that share no token with those of `select` and
`accept`. The learning rate is chosen on `select`: a few rates, each trained for a share of the tokens with a schedule
of its own, further ones outwards while the best is at an end. The result is measured on `accept` as it will be
written, and what was compressed stays where it is better.

All of it lies in the work directory until it is done: what was compressed, each training's checkpoints, what was
tuned. So a killed run goes on, and the output appears whole. Needs the dense model beside the compressed one, gradients
and AdamW's state of all that trains, and on disk the compressed model twice.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spectrim import finished
from spectrim.core import distributed, heap
from spectrim.core.plan import Plan
from spectrim.core.store import hash_of, write_json
from spectrim.data import text as texts
from spectrim.data.instructions import Row, pad_of
from spectrim.driving import text_hash
from spectrim.learn.losses import Distillation
from spectrim.learn.tuning import Diverged, Training
from spectrim.measure.evaluate import mean_losses, parameters, positions
from spectrim.model import loading
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.writer import new_directory
from spectrim.recipe import RecipeError, Tune
from spectrim.run import Run
from spectrim.tuning import TRAINING, Data, Request, Start, Tuned, Tuning

logger = logging.getLogger(__name__)

# What a try takes of the steps, the factor between rates, and how many are tried at most.
SHARE = 0.1
FACTOR = 3.0
MOST = 5
# Fewer tokens than these tell no rate from another, nor a better model from a worse one.
FEWEST = 1024


def ready(run: Run, text: Any, tokenizer: Any, trust_remote_code: bool) -> Recovery | None:
    """What tunes the run's result, None where its recipe does not; what the tuning reads is made part of the request.

    Raises ValueError for a live model, for windows or steps that cannot be, and where the tokens are fewer than a step.
    """
    tune = run.asked.tune
    if tune is None:
        return None
    if not isinstance(run.source, Checkpoint):
        raise ValueError(
            "this recipe tunes the compressed model towards the dense one, and a live model is compressed in place: "
            "save it with model.save_pretrained(DIR) and compress DIR, or leave out the recipe's section `tune`"
        )
    assert run.windows is not None
    longest, window = positions(run.source.model.config), tune.window or run.windows.shape[1]
    if longest is not None and window > longest:
        raise RecipeError(f"tune.window is {window}, and the model has {longest} positions")
    steps = tune.tokens // (tune.batch_size * window)
    if steps < 1:
        raise RecipeError(
            f"tune.tokens is {tune.tokens}, less than one step of {tune.batch_size} windows of {window} tokens: give "
            "more --tokens, or set tune.batch_size"
        )
    settings(run, tune, steps, None).train.accumulated(distributed.world())
    given = text if isinstance(text, Tensor) else _sources(text)
    run.tuned_on = run.data if isinstance(given, Tensor) else texts.fingerprint(given)
    return Recovery(run, tune, given, tokenizer, window, steps, trust_remote_code)


def _sources(text: str | Sequence[str]) -> list[texts.Source]:
    """The texts asked for. Raises RecipeError where they are none but what the model writes itself."""
    found = [texts.parse_source(name) for name in ([text] if isinstance(text, str) else text)]
    if all(source.name == texts.SELF for source in found):
        raise RecipeError("this recipe tunes on the tokens of a text, and --text is `self` alone: give a file too")
    return found


def settings(run: Run, tune: Tune, steps: int, rate: float | None) -> Request:
    """A tuning of that many steps, as `spectrim finetune` would be asked for it."""
    seed = run.asked.calibrate.seed if tune.seed is None else tune.seed
    train = Training(steps=steps, batch_size=tune.batch_size, learning_rate=rate, seed=seed)
    return Request(tune.method, tune.way(), train, Data("text", tune.window), Start(), Distillation())


@dataclass
class Recovery:
    """The tuning of one run."""

    run: Run
    tune: Tune
    text: Int[Tensor, "sequences length"] | Sequence[texts.Source]
    tokenizer: Any
    window: int
    steps: int
    trust: bool
    request: str | None = None  # what the output answers, where that is more than the run

    @cached_property
    def place(self) -> Path:
        """Where all of it lies until it is done."""
        key = {"request": finished.request_of(self.run), "tuned_on": self.run.tuned_on}
        return self.run.store.directory / "recovery" / hash_of(key)[:16]

    @property
    def untuned(self) -> Path:
        """Where the compressed model is to be written."""
        return self.place / "untuned"

    @heap.small(TRAINING)
    def go(
        self, plan: Plan, summary: Mapping[str, Any], facts: Mapping[str, Any], out: Path, overwrite: bool
    ) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
        """Tune what was compressed and write the better model to `out`: its plan, `spectrim.json` and `run.json`."""
        run, notes, record = self.run, list[str](), None
        found: dict[str, Any] = {"tokens": 0, "tries": {}, "accepted": False}
        with run.timings.stage("tune"):
            if not self._factored():
                notes.append("tune: every matrix stays dense, so there is nothing to tune")
            else:
                record = self._tuned(found, notes)
        for note in notes:
            logger.info(note)
        plan = replace(plan, notes=(*plan.notes, *notes))
        kept = [] if record is None else [record]
        told = {**summary, "plan": plan.to_json(), "recovery": found, **({"finetuning": kept} if kept else {})}
        chosen = self.untuned if record is None else self._out
        made = distributed.agreed(lambda: self._deliver(chosen, told, facts, out, overwrite))
        distributed.barrier()  # the first process has put it in its place
        return plan, *made

    @property
    def _out(self) -> Path:
        return self.place / "tuned"

    def _factored(self) -> bool:
        """Whether any matrix was decomposed."""
        layout = loading.read_layout(self.untuned) if loading.is_compressed(self.untuned) else {}
        return any(spec["format"] != "dense" for spec in layout.values())

    def _tuned(self, found: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
        """The record of the tuning, None where what was compressed is better; what happened goes into the other two."""
        rows = self._rows()
        rate, steps = self._rate(rows, found, notes)
        found["learning_rate"] = rate
        try:
            tuned = self._trained(rows, steps, rate)
        except Diverged as error:
            notes.append(f"tune: {error}; the untuned model stays")
            return None
        found["tokens"] += steps * self.tune.batch_size * self.window
        return tuned.record if self._accepted(found, notes) else None

    # --- the text ---

    def _rows(self) -> list[Row]:
        """The windows that are trained on: whole steps of them, each once but where a source is too short for that."""
        run, batch = self.run, self.tune.batch_size
        wanted = self.steps * batch
        assert run.windows is not None
        if isinstance(self.text, Tensor):
            own = [texts.fixed_windows(ids, self.window) for ids in run.windows if len(ids) >= self.window]
            pools, weights = [torch.cat(own) if own else run.windows[:0]], [wanted]
        else:
            asked, held = run.asked.calibrate, asked_windows(run)
            pools = texts.windows_beside(
                self.text, self.tokenizer, sum(held), run.windows.shape[1], asked.seed,
                range(held[0], sum(held)), self.window,
            )  # fmt: skip
            # what a model writes itself is for statistics alone
            read = [i for i, source in enumerate(self.text) if source.name != texts.SELF]
            pools = [pools[i] for i in read]
            weights = texts.shares([self.text[i] for i in read], wanted)
        ids = self._drawn(pools, weights)
        return [Row(each, each) for each in ids]

    def _drawn(self, pools: Sequence[Tensor], weights: Sequence[int]) -> Int[Tensor, "rows window"]:
        """That many windows of each pool, in a seeded order; where a pool has fewer it goes round again.

        Of one pool no window comes twice: the training itself goes round, each time in another order. Raises
        ValueError for a pool that has no window.
        """
        generator = torch.Generator().manual_seed(self._seed)
        drawn = []
        for number, (pool, count) in enumerate(zip(pools, weights, strict=True)):
            if count and not len(pool):
                name = "the text" if isinstance(self.text, Tensor) else self._names[number]
                raise ValueError(
                    f"{name}: beside the windows of calibrate.select and calibrate.accept it has none of {self.window} "
                    "tokens to tune on: give a longer text, or set tune.window"
                )
            if count > len(pool):
                logger.warning(
                    "tune: %d windows of %d tokens are wanted, and the text has %d: it goes round again, in another "
                    "order each time", count, self.window, len(pool),
                )  # fmt: skip
            rounds = 1 if len(pools) == 1 else math.ceil(count / max(1, len(pool)))
            order = [torch.randperm(len(pool), generator=generator) for _ in range(rounds)]
            drawn.append(pool[torch.cat(order)[:count]] if order else pool[:0])
        ids, batch = torch.cat(drawn), self.tune.batch_size
        ids = ids.repeat(math.ceil(batch / len(ids)), 1) if len(ids) < batch else ids
        return ids[: len(ids) // batch * batch]

    @property
    def _names(self) -> list[str]:
        """Of the pools."""
        return [] if isinstance(self.text, Tensor) else [s.name for s in self.text if s.name != texts.SELF]

    @property
    def _seed(self) -> int:
        return self.run.asked.calibrate.seed if self.tune.seed is None else self.tune.seed

    # --- the rate ---

    def _rate(self, rows: Sequence[Row], found: dict[str, Any], notes: list[str]) -> tuple[float, int]:
        """The learning rate, and the steps that are left for it once tries are paid for."""
        if self.tune.learning_rate != "auto":
            return self.tune.learning_rate, self.steps
        start, select = self.tune.way().learning_rate, self.run.select
        share = math.floor(self.steps * SHARE)
        tokens = 0 if select is None else select.numel()
        if tokens < FEWEST or select is None or not share:
            why = (
                f"{tokens} tokens of calibrate.select to choose on, not {FEWEST}"
                if share
                else f"{self.steps} steps, of which tries have a share of {SHARE}"
            )
            notes.append(f"tune.learning_rate: auto has {why}: it is {start}")
            logger.warning(notes[-1])
            return start, self.steps
        lost = searched(lambda rate: self._loss_of(rows, share, rate, select), start)
        best = min(lost, key=lambda rate: lost[rate])
        each = share * self.tune.batch_size * self.window
        found["tries"], found["tokens"] = {f"{rate:.4g}": lost[rate] for rate in sorted(lost)}, each * len(lost)
        tried = ", ".join(f"{rate:.4g}: {lost[rate]:.4g}" for rate in sorted(lost))
        notes.append(
            f"tune.learning_rate: {best:.4g}, of the KL on the windows of select after {each:,} tokens each ({tried})"
        )
        return best, self.steps - share * len(lost)

    def _loss_of(self, rows: Sequence[Row], steps: int, rate: float, windows: Tensor) -> float:
        """KL on windows after a short training, infinite where it does not get through."""
        tuning = self._tuning(rows, steps, rate)
        try:
            model = tuning.trained(self.place)
        except Diverged:
            return math.inf
        return distributed.agreed(lambda: self._measured(tuning, model, windows)[0])

    # --- training and measuring ---

    def _tuning(self, rows: Sequence[Row], steps: int, rate: float) -> Tuning:
        run = self.run
        assert isinstance(run.source, Checkpoint)
        asked = settings(run, self.tune, steps, rate)
        made = Tuning(asked, self.untuned, self._out, run.device, self.trust, run.progress)
        made.check(None, run.source.directory)
        made.rows, made.pad = list(rows), 0 if self.tokenizer is None else pad_of(self.tokenizer)
        made.data = str(text_hash(torch.stack([row.ids for row in rows])))
        return made

    def _trained(self, rows: Sequence[Row], steps: int, rate: float) -> Tuned:
        """The whole training, written to its place; found there if that was done."""
        tuning = self._tuning(rows, steps, rate)
        known = distributed.agreed(lambda: finished.answer(self._out, tuning.request()))
        if known is not None:
            return Tuned(self._out, known["finetuning"][-1], {})
        made = tuning.finish(tuning.trained(self.place), overwrite=True)
        distributed.barrier()
        return made

    def _measured(self, tuning: Tuning, model: Any, windows: Tensor) -> tuple[float, float]:
        """KL to the dense model and loss over it on windows, nats a token."""
        assert isinstance(self.run.source, Checkpoint)
        dense = tuning.load(self.run.source.directory)
        batch = self.run.asked.calibrate.batch
        own, kl = mean_losses(model, windows, batch, dense)
        assert kl is not None
        return kl, own - mean_losses(dense, windows, batch)[0]

    def _accepted(self, found: dict[str, Any], notes: list[str]) -> bool:
        """Whether the tuned model is the better one on the windows of `accept`, as both are stored."""
        windows, spent = self.run.accept, f"tune: {found['tokens']:,} tokens, tries included"
        tokens = 0 if windows is None else windows.numel()
        if tokens < FEWEST or windows is None:
            found["accepted"] = True
            notes.append(f"{spent}; not checked: {tokens} tokens of calibrate.accept, not {FEWEST}")
            logger.warning(notes[-1])
            return True

        def both() -> list[tuple[float, float]]:
            tuning = Tuning(
                settings(self.run, self.tune, 1, None),
                self.untuned,
                self._out,
                self.run.device,
                self.trust,
                self.run.progress,
            )
            return [self._measured(tuning, tuning.load(each), windows) for each in (self.untuned, self._out)]

        before, after = distributed.agreed(both)
        found["accept"] = {
            name: {"kl": kl, "excess": excess} for name, (kl, excess) in (("before", before), ("after", after))
        }
        better = bool(after[0] < before[0])
        found["accepted"] = better
        verdict = f"{spent}; KL on the windows of accept: {after[0]:.4g} after it, {before[0]:.4g} before it"
        notes.append(verdict if better else f"{verdict}; the untuned model stays")
        return better

    # --- the output ---

    def _deliver(
        self, chosen: Path, summary: dict[str, Any], facts: Mapping[str, Any], out: Path, overwrite: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the chosen model in its place, and remove what was made on the way. For one process alone."""
        assert parameters(chosen)["total"] == summary["parameters"]["total_after"], "tuning keeps every parameter"
        timings = {name: round(seconds, 4) for name, seconds in self.run.timings.seconds.items()}
        peak = heap.peak()
        with new_directory(out, overwrite) as directory:
            shutil.copytree(chosen, directory, dirs_exist_ok=True)
            told = json.loads(
                json.dumps(summary | finished.record(directory, self.request or finished.request_of(self.run)))
            )
            took = {**facts, "timings": timings, "peak_rss_bytes": peak}
            write_json(directory / finished.SUMMARY, told)
            write_json(directory / finished.FACTS, took)
        put_away(self)
        return told, took


def put_away(recovery: Recovery | None) -> None:
    """Remove what a tuning is no longer going to need, its output being there. Of several processes the first does."""
    if recovery is None or not distributed.first():
        return
    shutil.rmtree(recovery.place, ignore_errors=True)
    if recovery.place.parent.exists() and not any(recovery.place.parent.iterdir()):
        recovery.place.parent.rmdir()


def asked_windows(run: Run) -> tuple[int, int, int]:
    """How many windows of the text are for statistics, choices and acceptance."""
    found = [0 if windows is None else len(windows) for windows in (run.windows, run.select, run.accept)]
    return found[0], found[1], found[2]


def searched(loss: Callable[[float], float], start: float) -> dict[float, float]:
    """Losses of rates by rate: three around `start`, and further ones outwards while the best is at an end."""
    lost = {rate: loss(rate) for rate in (start, start / FACTOR, start * FACTOR)}
    while len(lost) < MOST:
        best = min(lost, key=lambda rate: lost[rate])
        if best not in (min(lost), max(lost)) or not math.isfinite(lost[best]):
            break
        further = best * FACTOR if best == max(lost) else best / FACTOR
        lost[further] = loss(further)
    return lost
