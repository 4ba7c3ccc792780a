"""What can be compressed, what is possible for it, what was picked: Target, Units, Candidate, Choice, Plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["rank", "column", "channel", "head", "entry"]


@dataclass(frozen=True, slots=True)
class Part:
    """One weight matrix: `module` computes y = W x with W of out_features × in_features.

    `input` is the key of the activation it reads: parts with one key read the same tensor, so share statistics.
    `bias` says whether the module has one.
    """

    module: str
    out_features: int
    in_features: int
    input: str
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Entries of the dense matrix."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Target:
    """Something that can be compressed: one matrix, or several that shrink together; `blocks` are their indices.

    An FFN as a whole (role `ffn`) has the matrix that reads its channels last, those that make them before it.
    """

    name: str
    role: str
    blocks: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Entries of the dense matrices of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def channels(self) -> int:
        """The width of an FFN: inputs of its last matrix."""
        return self.parts[-1].in_features


@dataclass(frozen=True)
class Units:
    """Removable pieces of one kind, best first.

    scores: larger = keep. errors: what removing each adds to Σ‖y − y′‖² at the target's output over the calibration
    tokens, or None where the method cannot say. cost: parameters of each, one number for all or one for each.
    """

    kind: Kind
    scores: Float[Tensor, "n"]
    errors: Float[Tensor, "n"] | None
    cost: int | Int[Tensor, "n"]

    @property
    def costs(self) -> Int[Tensor, "n"]:
        """Parameters of every unit."""
        if isinstance(self.cost, int):
            return torch.full(self.scores.shape, self.cost, dtype=torch.int64)
        return self.cost


@dataclass(frozen=True, slots=True)
class Choice:
    """What one target becomes: the format of each of its modules, and how many units of each kind stay.

    `bias` says that its modules have a bias, where the dense ones may have lacked it. `keep` lists, by kind, which
    units stay where that does not follow from their number. A count of entries is one of numbers kept of a sparse part.
    """

    formats: Mapping[str, str]
    counts: Mapping[str, int]
    error: float | None = None
    bias: bool = False
    keep: Mapping[str, tuple[int, ...]] | None = None


def balance(
    left: Float[Tensor, "out r"], right: Float[Tensor, "r in"]
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """The same product with each direction's norm split evenly between its two vectors; a zero direction stays."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), torch.sqrt(b / a), torch.ones_like(a))
    return left * scale, right / scale[:, None]


Tensors = Callable[[], Mapping[str, Tensor]]
# By module, then by statistic.
Measured = Callable[[], Mapping[str, Mapping[Any, Tensor]]]


@dataclass(frozen=True)
class Candidate:
    """What is possible for one target: an ordered list of units, and readers of the tensors behind them.

    `tensors()` holds what the method keeps (for rank units `left`, out × n orthonormal columns, best first, and
    `right` only where it is not leftᵀ W); `weights()` the dense matrices by module name, out × in; `statistics()`
    those that the method says it keeps. All are read when asked. fixed_cost: parameters at no units at all (of a bias
    that the dense module lacked). learned: what an allocator that trains made of it, any of

    - order: indices of the rank units, best first, in place of their own order;  entries: those of the entries;
    - scale: n numbers, one for each rank unit, which multiply it, also in a dense module;
    - left out × q and right q × in: further directions, which come before all others and are part of a rank kept;
    - offset: out numbers added to the bias.
    """

    target: Target
    units: tuple[Units, ...]
    tensors: Tensors
    weights: Tensors
    format: str = "low_rank"
    fixed_cost: int = 0
    statistics: Measured = dict
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank_units(self) -> Units:
        """The spectrum."""
        return next(units for units in self.units if units.kind == "rank")

    def first(self, parameters: int) -> Choice:
        """The best units, in their order, that `parameters` pay for."""
        units = self.units[0]
        spent = self.fixed_cost + torch.cumsum(units.costs, 0)
        count = int((spent <= parameters).sum())
        error = None if units.errors is None else float(units.errors[count:].sum())
        formats = {part.module: self.format for part in self.target.parts}
        return Choice(formats, {units.kind: count}, error, bias=self.fixed_cost > 0)

    def settle(self, choice: Choice) -> Choice:
        """The best choice known that has no more parameters than `choice`; here itself."""
        return choice

    def fit(self, parameters: int) -> Choice:
        """The best choice known for `parameters`."""
        return self.settle(self.first(parameters))

    def cut(self, choice: Choice) -> dict[str, dict[str, Tensor]]:
        """Tensors of each module at `choice`, by what its format is made of.

        low_rank and pivot: `left` out × r and `right` r × in, each direction's norm split evenly. Kept columns:
        `right` r × (in − c) over the other inputs in rising order, `columns` c and `kept` out × c. dense: `weight`,
        and `rows`, the outputs that stay, if not all do. Beside a sparse part `entries`, its places row · in + column
        in rising order, and `values`. Any may have `offset` out, which is added to the bias.
        """
        (part,) = self.target.parts
        weight = self.weights()[part.module]
        if choice.formats[part.module] == "dense":
            made = {"weight": self._rescaled(weight)}
        else:
            left, right = self._directions(choice.counts["rank"], weight)
            made = dict(zip(("left", "right"), balance(left, right), strict=True))
        return {part.module: {**made, **({"offset": self.learned["offset"]} if "offset" in self.learned else {})}}

    def _directions(
        self, rank: int, weight: Float[Tensor, "out in"]
    ) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """The factors of `rank` directions, learned ones first, the others scaled."""
        tensors, learned = self.tensors(), self.learned
        own = rank - (learned["left"].shape[1] if "left" in learned else 0)
        assert own >= 0, f"{self.target.name} has {-own} more learned directions than its rank of {rank}"
        kept = learned["order"][:own] if "order" in learned else torch.arange(own)
        left = tensors["left"][:, kept]
        right = tensors["right"][kept].to(left) if "right" in tensors else left.T @ weight.to(left)
        if "scale" in learned:
            right = learned["scale"][kept, None].to(right) * right
        if "left" in learned:
            left, right = (
                torch.cat([learned["left"].to(left), left], dim=1),
                torch.cat([learned["right"].to(right), right]),
            )
        return left, right

    def _rescaled(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The dense weight with what was learned in it."""
        tensors, changed = self.tensors(), weight.clone()
        if "scale" in self.learned:
            left = tensors["left"]
            right = tensors["right"].to(left) if "right" in tensors else left.T @ weight.to(left)
            changed += ((left * (self.learned["scale"].to(left) - 1)) @ right).to(weight)
        if "left" in self.learned:
            changed += (self.learned["left"] @ self.learned["right"]).to(weight)
        return changed

    def priced(self, format: str, cost: int | Int[Tensor, "n"]) -> Candidate:
        """The same candidate with its rank units stored in another format, at that format's costs."""
        units = tuple(replace(u, cost=cost) if u.kind == "rank" else u for u in self.units)
        return replace(self, units=units, format=format)


@dataclass(frozen=True)
class Plan:
    """What was picked for all targets; a target without a choice stays dense, bit for bit.

    budget: parameters that may be kept over the targets; spent: those kept, dense ones counted whole. learned: by
    target what its candidate is to have as `learned`; tensors, so no part of the JSON. curves: of a training, what each
    step reported, by name.
    """

    choices: Mapping[str, Choice]
    budget: int
    spent: int
    notes: tuple[str, ...] = field(default=())
    learned: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, choices in order of their names."""
        return {
            "budget": self.budget,
            "spent": self.spent,
            "choices": {name: asdict(self.choices[name]) for name in sorted(self.choices)},
            "notes": list(self.notes),
            **({"curves": {name: list(values) for name, values in self.curves.items()}} if self.curves else {}),
        }

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Inverse of `to_json`. Raises ValueError for data that is no plan."""
        plain = _shaped("a plan", data, _PLAN, required=("budget", "spent", "choices", "notes"))
        choices = {name: choice_from_json(choice) for name, choice in plain["choices"].items()}
        return Plan(choices, plain["budget"], plain["spent"], tuple(plain["notes"]), curves=plain.get("curves", {}))

    def dumps(self) -> str:
        """The plan as text."""
        return json.dumps(self.to_json(), indent=1)


def choice_from_json(data: Any) -> Choice:
    """A choice of its JSON data. Raises ValueError for data that is none."""
    plain = _shaped("a choice", data, _CHOICE, required=("formats", "counts"))
    keep = plain.get("keep")
    return Choice(**{**plain, "keep": None if keep is None else {kind: tuple(kept) for kind, kept in keep.items()}})


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _table(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and right(v) for k, v in value.items())


def _row(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(right(each) for each in value)


# What the JSON of a plan and of a choice may hold, by key.
_PLAN: dict[str, Callable[[Any], bool]] = {
    "budget": _whole,
    "spent": _whole,
    "choices": lambda value: isinstance(value, dict),
    "notes": _texts,
    "curves": _table(_row(_number)),
}
_CHOICE: dict[str, Callable[[Any], bool]] = {
    "formats": _table(lambda value: isinstance(value, str)),
    "counts": _table(_whole),
    "error": lambda value: value is None or _number(value),
    "bias": lambda value: isinstance(value, bool),
    "keep": lambda value: value is None or _table(_row(_whole))(value),
}


def _shaped(
    what: str, data: Any, right: Mapping[str, Callable[[Any], bool]], required: Sequence[str]
) -> dict[str, Any]:
    """The data, if it has the keys required, no unknown one, and values of the right kinds; else ValueError."""
    if not isinstance(data, dict) or not set(required) <= set(data) <= set(right):
        raise ValueError(f"{what} is an object with the keys {', '.join(right)}, not {data!r:.200}")
    for key, value in data.items():
        if not right[key](value):
            raise ValueError(f"{what} cannot have the {key} {value!r:.200}")
    return dict(data)


def merge(plans: list[Plan]) -> Plan:
    """One plan of several over disjoint targets."""
    choices = {name: choice for plan in plans for name, choice in plan.choices.items()}
    notes = tuple(note for plan in plans for note in plan.notes)
    learned = {name: tensors for plan in plans for name, tensors in plan.learned.items()}
    curves: dict[str, Sequence[float]] = {}
    for plan in plans:
        for name, values in plan.curves.items():
            curves[name if name not in curves else f"{name} {sum(name in known for known in curves) + 1}"] = values
    return Plan(choices, sum(p.budget for p in plans), sum(p.spent for p in plans), notes, learned, curves)
