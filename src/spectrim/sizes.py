"""How small a model is to become, said otherwise than by a ratio: in bytes, in parameters, or by what it may lose.

- bytes: of the safetensors files, headers, indices and all that stays dense included; of a live model, which has no
  files, of its tensors;
- parameters: floating-point numbers of the whole model, as `evaluate` counts them, embeddings included;
- loss: see `searching`.

Each is turned into a ratio. In a recipe of several groups their ratios keep their proportions, and "the ratio" is the
largest of them (all alike where all are 0).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.core import budget
from spectrim.core.plan import Choice, Plan, Target
from spectrim.core.store import hash_of
from spectrim.jobs import Job, allocate_early, plan_jobs
from spectrim.measure.evaluate import parameters
from spectrim.model import apply, modules, writer
from spectrim.model.checkpoint import Checkpoint, Weights
from spectrim.model.files import weight_files
from spectrim.model.targets import Structure
from spectrim.needs import parse_size
from spectrim.recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

GRID = 10**6  # a ratio is a whole number of millionths
ACCEPT = 0.1  # share of the windows that a loss is measured on, where the recipe keeps none
_OF = {"bytes": ("--budget", "bytes", 0.005), "parameters": ("--parameters", "parameters", 0.001)}


@dataclass(frozen=True)
class Size:
    """What is wanted, one of: bytes at most, parameters at most, excess loss at most (nats a token)."""

    bytes: int | None = None
    parameters: int | None = None
    max_loss: int | float | None = None

    @property
    def limit(self) -> int:
        """The bytes or parameters."""
        found = self.bytes if self.parameters is None else self.parameters
        assert found is not None
        return found

    @property
    def of(self) -> str:
        """Which of them; what `Taken` calls it."""
        return "bytes" if self.parameters is None else "parameters"

    @property
    def option(self) -> str:
        """As the command line has it."""
        return _OF[self.of][0]

    @property
    def tolerance(self) -> int:
        """How much below the limit is near enough."""
        return int(self.limit * _OF[self.of][2])


@dataclass(frozen=True)
class Taken:
    """What a model takes: floating-point numbers, and bytes as this file's docstring says."""

    parameters: int
    bytes: int


def only_one(given: Mapping[str, Any]) -> None:
    """Raise RecipeError where more than one of these options has a value."""
    options = [name for name, value in given.items() if value is not None]
    if len(options) > 1:
        raise RecipeError(f"{' and '.join(options)} each say how small the model is to be: give one of them")


def asked_for(
    ratio: float | None, budget: str | int | None, parameters: int | float | None, max_loss: int | float | None
) -> Size | None:
    """The size wanted, None where it is said by ratios. Raises RecipeError for two at once, or for what is no size."""
    only_one({"--ratio": ratio, "--budget": budget, "--parameters": parameters, "--max-loss": max_loss})
    if budget is not None:
        return Size(bytes=parse_size(budget, "--budget"))
    if parameters is not None:
        if not math.isfinite(parameters) or parameters < 1:
            raise RecipeError(f"--parameters {parameters}: give how many the model may have, such as 3.2e9")
        return Size(parameters=int(parameters))
    if max_loss is not None:
        if not math.isfinite(max_loss) or max_loss < 0:
            raise RecipeError(f"--max-loss {max_loss}: give nats a token over the dense model, such as 0.05")
        return Size(max_loss=max_loss)
    return None


def wish_of(asked: Recipe, size: Size | None, measure: bool) -> dict[str, Any]:
    """What of a command decides its output beside the recipe of a ratio; `spectrim.json` has it too."""
    recipe_hash = hash_of(asked.model_dump(exclude_none=True))
    wish: dict[str, Any] = {"measured": True} if measure else {}
    if size is not None:
        wanted = {name: value for name, value in asdict(size).items() if value is not None}
        wish["size"] = {**wanted, "recipe_hash": recipe_hash}
    return wish


def with_windows(asked: Recipe, size: Size | None) -> Recipe:
    """The recipe with windows to measure a loss on, where that is what is wanted."""
    if size is None or size.max_loss is None or asked.calibrate.accept > 0:
        return asked
    logger.warning("--max-loss is measured on windows kept from all else: calibrate.accept is %s", ACCEPT)
    return asked.model_copy(update={"calibrate": asked.calibrate.model_copy(update={"accept": ACCEPT})})


# --- ratios ---


def largest(asked: Recipe) -> float:
    """The ratio that stands for a recipe."""
    return max(group.ratio for group in asked.groups)


def scaled(asked: Recipe, ratio: float) -> Recipe:
    """The recipe at another ratio, the groups' in proportion."""
    groups = [
        group.model_copy(update={"ratio": round(ratio * share, 6)})
        for group, share in zip(asked.groups, _shares(asked), strict=True)
    ]
    return asked.model_copy(update={"groups": groups})


def _shares(asked: Recipe) -> list[float]:
    most = largest(asked)
    return [group.ratio / most if most > 0 else 1.0 for group in asked.groups]


def most_possible(asked: Recipe, structure: Structure, steps: int, below: int) -> int:
    """The largest ratio, in 1 / steps and less than `below` of them, that the allocators do not refuse by shapes."""
    possible, not_so = 0, below
    _early(scaled(asked, 0.0), structure)  # what is wrong at every ratio is said as it is
    while not_so - possible > 1:
        middle = (possible + not_so) // 2
        fits = refused(scaled(asked, middle / steps), structure) is None
        possible, not_so = (middle, not_so) if fits else (possible, middle)
    return possible


def refused(asked: Recipe, structure: Structure) -> RecipeError | None:
    """Why allocators have no plan for these shapes at these ratios; None where they do not say so yet."""
    try:
        _early(asked, structure)
    except RecipeError as error:
        return error
    return None


def _early(asked: Recipe, structure: Structure) -> None:
    for job in plan_jobs(asked, structure):
        allocate_early(job, asked)


# --- what a plan takes ---


def taken(source: Weights, structure: Structure, plan: Plan, dtype: torch.dtype | None = None) -> Taken:
    """What a model takes with a plan, in files or, for a live one, in memory; dtype: what it is cast to."""
    if not isinstance(source, Checkpoint):
        return taken_in_memory(source.model, structure, plan, dtype)
    place = apply.placed(plan, structure, source.model)
    items, _ = apply.pieces(source, place, plan, {}, dtype)
    numbers = [
        torch.Size(shape).numel() for item in items for kind, shape in item.shapes.values() if kind.is_floating_point
    ]
    return Taken(sum(numbers), writer.file_bytes(items, apply.SHARD_BYTES))


def taken_in_memory(
    model: PreTrainedModel, structure: Structure, plan: Plan, dtype: torch.dtype | None = None
) -> Taken:
    """The same of a model, or of the outline of one, whose tensors count once where they are tied."""
    place = apply.placed(plan, structure, model)
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    found = []
    for name, spec in place.specs.items():
        old = model.get_submodule(name)
        for tensor in old.state_dict(keep_vars=True).values():
            tensors.pop(id(tensor))
        kind = old.get_parameter("weight").dtype
        found += list(modules.empty(spec, device="meta", dtype=kind).state_dict().values())
    found += list(tensors.values())
    floating = [each for each in found if each.is_floating_point()]
    sizes = [
        each.numel() * (dtype if dtype is not None and each.is_floating_point() else each.dtype).itemsize
        for each in found
    ]
    return Taken(sum(each.numel() for each in floating), sum(sizes))


def on_disk(directory: Path) -> Taken:
    """What a model directory takes."""
    return Taken(parameters(directory)["total"], sum(file.stat().st_size for file in weight_files(directory)))


# --- from bytes or parameters to a ratio ---


@dataclass
class Aim:
    """A number of bytes or parameters for a recipe on a model, and what the output takes as a function of the ratio.

    of: what it takes with a plan; itemsize: bytes of a number of the targets, as stored.
    """

    size: Size
    asked: Recipe
    structure: Structure
    of: Callable[[Plan], Taken]
    itemsize: int
    overhead: int = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = plan_jobs(scaled(self.asked, 0.0), self.structure)
        outline = _outline(self.jobs)
        self.overhead = self.measure(outline) - self.each * outline.spent

    @property
    def each(self) -> int:
        """What a number of a target takes."""
        return self.itemsize if self.size.of == "bytes" else 1

    def measure(self, plan: Plan) -> int:
        """What the output takes with a plan."""
        return int(getattr(self.of(plan), self.size.of))

    def left(self, ratio: float) -> int:
        """What about it takes at a ratio: all that is not compressed, with indices and headers, and the budget."""
        groups = zip(self.jobs, scaled(self.asked, ratio).groups, strict=True)
        return self.overhead + self.each * sum(budget.allowed(job.targets, group.ratio) for job, group in groups)

    @property
    def slope(self) -> float:
        """What a whole ratio takes away."""
        pairs = zip(self.jobs, _shares(self.asked), strict=True)
        return self.each * sum(share * _dense(job) for job, share in pairs)

    @property
    def unit(self) -> int:
        """What allocators may leave unspent: the largest unit of each."""
        return self.each * sum(_largest_unit(job) for job in self.jobs)

    def first(self) -> int:
        """The least ratio, in millionths, that should come out within the limit.

        Raises RecipeError where the model is that small already, and where no ratio makes it so.
        """
        dense, wanted = self.measure(Plan({}, 0, 0)), self.size.limit
        if wanted >= dense:
            raise RecipeError(
                f"{self.size.option} {wanted:,}: the model takes {dense:,} {self.size.of} as it is, so nothing has to "
                "be removed; give less"
            )
        ratio = max(1, math.floor((self.left(0.0) - wanted) / self.slope * GRID) - 1)
        while ratio < GRID and self.left(ratio / GRID) > wanted:
            ratio += 1
        if ratio >= GRID or refused(scaled(self.asked, ratio / GRID), self.structure) is not None:
            self._refuse(ratio)
        return ratio

    def _refuse(self, ratio: int) -> None:
        steps = 10**4  # fine enough for what is only said
        most = most_possible(self.asked, self.structure, steps, -(-min(ratio, GRID) * steps // GRID)) / steps
        least = self.left(most)
        raise RecipeError(
            f"{self.size.option} {self.size.limit:,} is too small: the least that is reachable is {least:,} "
            f"{self.size.of}, {self.overhead:,} of them what is not compressed (embeddings, norms, the output head, "
            f"indices) and {least - self.overhead:,} what this recipe leaves of the matrices at its largest ratio, "
            f"{most}"
        )


def aimed(asked: Recipe, size: Size | None, source: Weights, structure: Structure, dtype: Any) -> Aim | None:
    """The aim for a checkpoint or a live model, None where the size is not one in bytes or parameters."""
    if size is None or size.max_loss is not None:
        return None
    stored = source.stored_dtype if isinstance(source, Checkpoint) else source.model.dtype
    of = partial(taken, source, structure, dtype=dtype)
    return Aim(size, asked, structure, of, (dtype or stored).itemsize)


def _outline(jobs: Sequence[Job]) -> Plan:
    """Every target compressed to next to nothing; of matrices with single entries, half of these."""
    choices: dict[str, Choice] = {}
    spent = 0
    for job in jobs:
        for target in job.targets:
            choice = _least_choice(job, target)
            if choice is None:
                spent += target.parameters
            else:
                choices[target.name] = choice
                spent += budget.count(choice, target)
    return Plan(choices, spent, spent)


def _least_choice(job: Job, target: Target) -> Choice | None:
    kinds, bias = job.decomposers[target.name].kinds, job.fixed.get(target.name, 0) > 0
    if budget.is_ffn(target):
        return Choice({part.module: "dense" for part in target.parts}, {"channel": 1}, bias=bias)
    if "entry" in kinds:
        formats = {part.module: budget.WITH_ENTRIES[job.format] for part in target.parts}
        return Choice(formats, {"rank": 0, "entry": target.parameters // 2}, bias=bias)
    (part,) = target.parts
    if budget.largest_rank(job.format, part) == 0:
        return None
    return Choice({part.module: job.format}, {"rank": 1}, bias=bias)


def _dense(job: Job) -> int:
    return sum(target.parameters for target in job.targets)


def _largest_unit(job: Job) -> int:
    """Parameters of the largest step of one unit; FFNs step together."""
    together = sum(t.parameters // t.channels for t in job.targets if budget.is_ffn(t))
    alone = [part.out_features + part.in_features for t in job.targets if not budget.is_ffn(t) for part in t.parts]
    return max([together, *alone])
