"""The tables of methods by name, and what a method must offer to be in one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core.plan import Candidate, Choice, Kind, Measured, Part, Plan, Target, Tensors, Units
from spectrim.core.progress import Progress, silent

# Statistic objects live in calibrate.statistics; core only passes them on.
Statistics = Mapping[Any, Tensor]

Sees = Literal["shapes", "units", "model"]


@runtime_checkable
class Decomposer(Protocol):
    """Turns a target's weights and statistics into a Candidate. A frozen dataclass: its fields are its settings.

    A class that names this one as its base has the defaults below.
    """

    @property
    def needs(self) -> tuple[Any, ...]:
        """The statistics wanted; nothing else is collected."""
        return ()

    @property
    def keeps(self) -> tuple[Any, ...]:
        """Those of them that its candidates read after the block is gone."""
        return ()

    @property
    def first_like(self) -> str:
        """What decides its candidates' first choices: what allocators remember of these serves all methods alike."""
        return f"{type(self).__module__}.{self!r}"

    @property
    def whole(self) -> bool:
        """Whether it works on FFNs as wholes (role `ffn`), not on single matrices."""
        return False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of units that its candidates have, the first being those of `Candidate.first`."""
        return ("channel",) if self.whole else ("rank",)

    @property
    def scalable(self) -> bool:
        """Whether its rank units may be chosen singly and scaled: their candidate's cut heeds what was learned."""
        return self.kinds == ("rank",)

    @property
    def keeps_right(self) -> bool:
        """Whether right of its candidates is not leftᵀ W, so is stored beside left."""
        return False

    @property
    def adds_bias(self) -> bool:
        """Whether what it makes of a module has a bias, also where the dense one lacks it."""
        return False

    def cutting(self, part: Part) -> int:
        """Bytes that its candidates hold while they are cut to a choice, beside the weight and its factors."""
        return 0

    def settled(self, backwards: bool) -> Decomposer:
        """The same with what it leaves open (`auto`) decided; backwards: whether the model can be run backwards."""
        return self

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """The candidate of one target; `weights` and `stats` are keyed by the parts' modules."""
        ...

    def restore(
        self, target: Target, units: tuple[Units, ...], tensors: Tensors, weights: Tensors, statistics: Measured
    ) -> Candidate:
        """The candidate again, of what the store kept of it."""
        return Candidate(target, units, tensors, weights, statistics=statistics)


@runtime_checkable
class Live(Protocol):
    """The model in memory, for allocators that try plans on it. Windows are those of calibration, in batches."""

    @property
    def blocks(self) -> int:
        """Their number."""
        ...

    def batches(self, sequences: int | None = None, length: int | None = None) -> list[Int[Tensor, "batch length"]]:
        """The first windows, cut to a length (None: all, whole); all there are where fewer or shorter."""
        ...

    def enter(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
        """The hidden state entering the first block."""
        ...

    def run(
        self, ids: Int[Tensor, "batch length"], state: Float[Tensor, "batch length hidden"], start: int, stop: int
    ) -> Float[Tensor, "batch length hidden"]:
        """The state entering block `stop` from the one entering block `start`, with what is installed."""
        ...

    def logits(
        self, ids: Int[Tensor, "batch length"], state: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """What follows the blocks, from the state leaving the last one."""
        ...

    def installed(self, plan: Plan) -> AbstractContextManager[None]:
        """The model with a plan in it, also of a few targets; afterwards bit for bit as before. It nests."""
        ...

    def built(self, target: str, choice: Choice) -> Mapping[str, Any]:
        """The modules that a choice makes of a target, by name."""
        ...

    def swapped(self, modules: Mapping[str, Any]) -> AbstractContextManager[None]:
        """The model with built modules in it, as `installed`."""
        ...


@runtime_checkable
class Trainable(Live, Protocol):
    """The model in memory for allocators that train on it."""

    @property
    def model(self) -> Any:
        """The module itself, in evaluation mode."""
        ...

    def answer(
        self, ids: Int[Tensor, "batch length"], recompute: bool = False
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The logits of the whole model, with gradients if they are on; recompute: activations once a block only."""
        ...


@runtime_checkable
class Measures(Protocol):
    """What changes lose on trial windows: KL(dense ‖ changed) of the next-token distributions, nats, mean over tokens.

    base: choices by target of the state that changes are made to, every other target dense. trial and length: of the
    calibration windows how many of the last ones are run, and how far (None: all, whole).
    """

    def deviations(
        self,
        base: Mapping[str, Choice | None],
        changed: Mapping[str, Choice | None],
        trial: int | None,
        length: int | None,
        progress: Callable[[int, int], None],
    ) -> Iterator[tuple[str, float]]:
        """By target the loss of the base state with that one changed (None: dense), each as soon as it is known.

        progress: told how much of all is done, for the first time after what comes first was taken.
        """
        ...

    def deviation(self, base: Mapping[str, Choice | None], trial: int | None, length: int | None) -> float:
        """The loss of the base state."""
        ...


# remember(name, fields, make): tensors kept in the work directory under these fields and all that the problem comes
# from but its budget; made now if they are not there.
Remember = Callable[[str, Mapping[str, Any], Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]


def forgetful(name: str, fields: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """A `remember` without a work directory."""
    return make()


class _NotThere(Exception):
    """Raised in the place of making what is only asked for."""


def recalled(remember: Remember, name: str, fields: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """What is remembered under these fields, None where nothing is."""

    def make() -> Mapping[str, Tensor]:
        raise _NotThere

    try:
        return remember(name, fields, make)
    except _NotThere:
        return None


@runtime_checkable
class Slot(Protocol):
    """A place in the work directory for a training that is under way: always a whole state, the last one saved."""

    def load(self) -> Mapping[str, Tensor] | None:
        """The state, None where there is none."""
        ...

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state, at once or not at all."""
        ...

    def clear(self) -> None:
        """Remove it: the training is done."""
        ...


class Memory:
    """A slot without a work directory."""

    def __init__(self) -> None:
        self.state: Mapping[str, Tensor] | None = None

    def load(self) -> Mapping[str, Tensor] | None:
        """The state, None where there is none."""
        return self.state

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by a copy."""
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def clear(self) -> None:
        """Remove it."""
        self.state = None


# slot(name, fields): keyed as `Remember` is.
Slots = Callable[[str, Mapping[str, Any]], Slot]


@dataclass(frozen=True)
class Problem:
    """All that an allocator may see.

    budget: parameters that may be kept over `targets`; format: the module format of rank units; fixed: by target,
    parameters of a bias that its method adds once it is not dense; itemsize: bytes of a number as it will be stored,
    known where candidates are. candidates (by target) and statistics (by index of the block) only for an allocator
    whose `sees` is "units" or "model", live only for "model"; in its place one that says what is `streamed` has
    `measures` where there is a limit on memory.
    """

    targets: Sequence[Target]
    budget: int
    format: str
    generator: torch.Generator
    candidates: Mapping[str, Candidate] | None = None
    statistics: Mapping[int, Statistics] | None = None
    live: Live | None = None
    measures: Measures | None = None
    remember: Remember = forgetful
    slot: Slots = field(default=lambda name, fields: Memory())
    progress: Progress = silent
    fixed: Mapping[str, int] = field(default_factory=dict)
    itemsize: int = 4

    @property
    def dense(self) -> int:
        """Parameters of all targets."""
        return sum(target.parameters for target in self.targets)


@runtime_checkable
class Allocator(Protocol):
    """Spends a budget over targets. A frozen dataclass: its fields are its settings.

    A class that names this one as its base has the defaults of what has a body here.
    """

    @property
    def needs(self) -> tuple[Any, ...]:
        """The statistics wanted, of blocks."""
        ...

    @property
    def sees(self) -> Sees:
        """What of the problem it reads: an allocator of shapes plans before anything heavy runs."""
        ...

    @property
    def grain(self) -> int:
        """Its coarsest step, in units."""
        ...

    @property
    def learns(self) -> bool:
        """Whether it trains on the model: its candidates keep every direction, and none is made anew afterwards."""
        return False

    def streamed(self, sequences: int, length: int) -> tuple[int, int] | None:
        """Where `Problem.measures` is all that it wants of the model: windows that it runs of all, and tokens of each.

        None: it wants the model in memory.
        """
        return None

    def trained_bytes(self, target: Target, directions: int, entries: int) -> int:
        """About what a training keeps on disk of so many units of a target: a state under way, a result, the plan's."""
        # AdamW and a few numbers for each unit, all in float32
        return 56 * (directions + entries)

    def refuses(self, decomposer: Decomposer) -> str:
        """Why candidates of that decomposer are none that it can choose from; empty: they are."""
        return ""

    def check(self, problem: Problem) -> None:
        """Raise ValueError where shapes alone, all that `problem` has, say that there is no plan: before a run."""

    def allocate(self, problem: Problem) -> Plan:
        """A plan that spends at most the budget, short of it by less than `grain` times the largest unit."""
        ...


Method = TypeVar("Method", bound=type)

_decomposers: dict[str, type[Any]] = {}
_allocators: dict[str, type[Any]] = {}


def decomposer(name: str) -> Callable[[Method], Method]:
    """Class decorator: registers a decomposer. Raises ValueError for a name that is taken."""
    return register(_decomposers, "method", name)


def allocator(name: str) -> Callable[[Method], Method]:
    """Class decorator: registers an allocator. Raises ValueError for a name that is taken."""
    return register(_allocators, "method", name)


def register(table: dict[str, type[Any]], kind: str, name: str) -> Callable[[Method], Method]:
    """Class decorator: puts a class into a table. Raises ValueError for a name that is taken; kind: what it is."""

    def add(cls: Method) -> Method:
        if name in table:
            raise ValueError(f"{kind} {name!r} is registered twice: {table[name]} and {cls}")
        table[name] = cls
        return cls

    return add


def decomposers() -> dict[str, type[Any]]:
    """Every registered decomposer by name."""
    _load()
    return dict(_decomposers)


def allocators() -> dict[str, type[Any]]:
    """Every registered allocator by name."""
    _load()
    return dict(_allocators)


def _load() -> None:
    """Import the shipped methods and those of other packages (entry-point group `spectrim.methods`)."""
    import spectrim.methods  # noqa: F401  the methods register themselves when imported

    for point in entry_points(group="spectrim.methods"):
        point.load()


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, and all of them."""
    close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known))}"


def build(kind: str, table: Mapping[str, type[Any]], name: str, settings: Mapping[str, Any]) -> Any:
    """The method `name` of `table` with its settings, types checked.

    Raises ValueError for an unknown method or setting (naming the closest known one) and for a setting of a wrong type.
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: {nearest(name, table.keys())}")
    known = [setting.name for setting in fields(table[name])]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{kind} {name!r} has no setting {setting!r}: {nearest(setting, known)}")
    import pydantic

    try:
        return pydantic.TypeAdapter(table[name]).validate_python(dict(settings))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        # a check across settings has no place of its own, and names what it refuses in its message
        where = "".join(f", setting {key}" for key in problem["loc"][:1])
        reason = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{kind} {name!r}{where}: {reason}, given {problem['input']!r}") from error
