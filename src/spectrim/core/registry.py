"""The tables of methods by name, and what a method must offer to be in one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from spectrim.core.plan import Candidate, Plan, Target

# Statistic objects live in calibrate.statistics; core only passes them on.
Statistics = Mapping[Any, Tensor]


@runtime_checkable
class Decomposer(Protocol):
    """Turns a target's weights and statistics into a Candidate. A frozen dataclass: its fields are its settings."""

    @property
    def needs(self) -> tuple[Any, ...]:
        """The statistics wanted; nothing else is collected."""
        ...

    def decompose(self, target: Target, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]) -> Candidate:
        """The candidate of one target; `weights` and `stats` are keyed by the parts' modules."""
        ...


@dataclass(frozen=True)
class Problem:
    """All that an allocator may see.

    budget: parameters that may be kept over `targets`; format: the module format of rank units; candidates (by target)
    and statistics (by index of the block) only for an allocator whose `sees` is "units".
    """

    targets: Sequence[Target]
    budget: int
    format: str
    generator: torch.Generator
    candidates: Mapping[str, Candidate] | None = None
    statistics: Mapping[int, Statistics] | None = None


@runtime_checkable
class Allocator(Protocol):
    """Spends a budget over targets. A frozen dataclass: its fields are its settings."""

    @property
    def needs(self) -> tuple[Any, ...]:
        """The statistics wanted."""
        ...

    @property
    def sees(self) -> Literal["shapes", "units"]:
        """What of the problem it reads: an allocator of shapes plans before anything heavy runs."""
        ...

    @property
    def grain(self) -> int:
        """Its coarsest step, in units."""
        ...

    def allocate(self, problem: Problem) -> Plan:
        """A plan that spends at most the budget, short of it by less than `grain` times the largest unit."""
        ...


Method = TypeVar("Method", bound=type)

_decomposers: dict[str, type[Any]] = {}
_allocators: dict[str, type[Any]] = {}


def decomposer(name: str) -> Callable[[Method], Method]:
    """Class decorator: registers a decomposer. Raises ValueError for a name that is taken."""
    return _register(_decomposers, name)


def allocator(name: str) -> Callable[[Method], Method]:
    """Class decorator: registers an allocator. Raises ValueError for a name that is taken."""
    return _register(_allocators, name)


def _register(table: dict[str, type[Any]], name: str) -> Callable[[Method], Method]:
    def add(cls: Method) -> Method:
        if name in table:
            raise ValueError(f"method {name!r} is registered twice: {table[name]} and {cls}")
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
    known = [field.name for field in fields(table[name])]
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
