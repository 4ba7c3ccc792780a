"""What the user asks: recipes as YAML, checked whole before anything runs."""

from __future__ import annotations

import fnmatch
import importlib.resources
import re
import reprlib
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from spectrim.core import finetuner, registry
from spectrim.core.plan import Target


class RecipeError(ValueError):
    """A recipe cannot be used: says which key, what was given and what is nearest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibrate(_Strict):
    """What text is read for statistics."""

    sequences: int = Field(128, gt=0, description="windows of text")
    length: int | None = Field(None, gt=1, description="tokens a window; None: the model's maximum, at most 2048")
    seed: int = Field(0, ge=0, description="of the choice of windows")
    batch: int = Field(8, gt=0, description="windows run at once")
    shrink: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.0, description="of Grams towards `shrink_to`, against what is only so in this text; auto: chosen on `select`"
    )
    shrink_to: Literal["identity", "diagonal"] = Field(
        "identity", description="the identity times the mean of a Gram's diagonal, or that diagonal itself"
    )
    sequential: bool = Field(False, description="decompose each block from inputs that the compressed ones before gave")
    target: Literal["own", "dense", "mix"] = Field(
        "own", description="in that pass, outputs aimed at: the matrix's own, the dense model's, or a mix of both"
    )
    mix: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.5, description="share of the dense model's outputs in the mix; auto: the best on the windows of `select`"
    )
    residual_aware: bool | Literal["auto"] = Field(
        "auto",
        description="aim o and down at the dense residual stream, where they add up to it, not at their own part",
    )
    ridge: float = Field(1e-3, gt=0, description="of the fit to these outputs, as a share of the inputs' mean energy")
    select: float = Field(0.0, ge=0, lt=1, description="share of the windows kept from statistics, to choose on")
    accept: float = Field(0.0, ge=0, lt=1, description="share kept from all that, to check the second pass on")

    def shared_out(self, windows: int) -> tuple[int, int, int]:
        """How many of the windows are for statistics, for choices and for acceptance, in this order."""
        select, accept = round(self.select * windows), round(self.accept * windows)
        return windows - select - accept, select, accept

    @property
    def paired(self) -> bool:
        """Whether the second pass runs the dense model beside the compressed one."""
        return self.sequential and self.target != "own"


class Method(BaseModel):
    """A method by name; every other key is a setting of it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str
    match: str | list[str] = "*"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings."""
        return dict(self.model_extra or {})


class Group(_Strict):
    """A set of targets with one decomposer (or several, each with its own `match`), allocator, format and ratio."""

    match: str | list[str] = "*"
    ratio: float = Field(0.2, ge=0, lt=1, description="fraction of the group's parameters to remove")
    format: Literal["plain", "pivot"] = "plain"
    decompose: list[Method] = Field(min_length=1)
    allocate: Method = Method(method="uniform")

    @field_validator("decompose", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("allocate")
    @classmethod
    def _of_whole_group(cls, value: Method) -> Method:
        if value.match != "*":
            raise ValueError("an allocator serves its whole group: match is a key of the group, or of a decomposer")
        return value


class Tune(_Strict):
    """Distillation from the dense model once it is compressed; ranks and parameters stay."""

    method: str = Field("full", description="a way of tuning factors in one stage (`spectrim methods`)")
    settings: dict[str, Any] = Field({}, description="of the method; `full` has relative learning rates by default")
    tokens: int = Field(2_000_000, gt=0, description="of text that is trained on at most, tries included")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto", description="auto: the best on the windows of `calibrate.select`"
    )
    batch_size: int = Field(8, gt=0, description="windows a step")
    window: int | None = Field(None, gt=1, description="tokens a window; None: as in calibration")
    seed: int | None = Field(None, ge=0, description="of the order of windows; None: as in calibration")

    @field_validator("tokens", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """`2e6` is a word to YAML."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    def way(self) -> Any:
        """The way of tuning. Raises RecipeError for one that does not keep ranks, or needs more than factors."""
        settings = {"relative": True, **self.settings} if self.method == "full" else self.settings
        try:
            found = registry.build("way of tuning", finetuner.finetuners(), self.method, settings)
        except ValueError as error:
            raise RecipeError(f"tune: {error}") from error
        if found.wants != "factors" or found.beside or found.stages != 1 or not found.keeps_rank:
            raise RecipeError(
                f"tune.method: {self.method} with {settings} does not tune the factors as they are, in one stage; "
                "`full` does"
            )
        return found


class Recipe(_Strict):
    """Everything that decides the result beside the model and the text."""

    about: str = ""
    calibrate: Calibrate = Calibrate()
    tune: Tune | None = None
    groups: list[Group] = Field(min_length=1)

    def decomposers(self, group: Group, members: Sequence[Target]) -> dict[str, Any]:
        """The decomposer of each target of a group: the first whose `match` has it. Raises RecipeError if none."""
        table = registry.decomposers()
        built = [(method.match, _built("decomposer", table, method)) for method in group.decompose]
        found = {}
        for target in members:
            fitting = [decomposer for match, decomposer in built if matches(match, target)]
            if not fitting:
                raise RecipeError(
                    f"no decomposer of the group {group.match!r} matches {target.name} (role {target.role})"
                )
            found[target.name] = fitting[0]
        return found

    def allocator(self, group: Group) -> Any:
        """The allocator of a group."""
        return _built("allocator", registry.allocators(), group.allocate)


def _built(kind: str, table: Mapping[str, type[Any]], method: Method) -> Any:
    try:
        return registry.build(kind, table, method.method, method.settings)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def matches(match: str | Sequence[str], target: Target) -> bool:
    """Whether a target has one of the roles, or its name fits one of the globs."""
    patterns = [match] if isinstance(match, str) else match
    return any(pattern == target.role or fnmatch.fnmatchcase(target.name, pattern) for pattern in patterns)


def grouped(recipe: Recipe, targets: Sequence[Target], ffns: Sequence[Target] = ()) -> list[list[Target]]:
    """The targets of each group; FFNs as wholes only where `match` says `ffn`.

    Raises RecipeError for a module in two groups (`ffn` and `gate`) or twice in one, or a group with no target.
    """
    owners: dict[str, int] = {}
    groups: list[list[Target]] = []
    for i, group in enumerate(recipe.groups):
        members = [target for target in targets if matches(group.match, target)]
        if "ffn" in ([group.match] if isinstance(group.match, str) else group.match):
            members += ffns
        if not members:
            roles = sorted({target.role for target in (*targets, *ffns)})
            raise RecipeError(
                f"groups.{i}: match {group.match!r} has no target here; roles present: {', '.join(roles)}"
            )
        for module in (part.module for target in members for part in target.parts):
            if owners.setdefault(module, i) != i:
                raise RecipeError(f"{module} is in two groups: groups.{owners[module]} and groups.{i}")
        for ffn in (target for target in members if target.role == "ffn"):
            twice = {part.module for part in ffn.parts} & {target.name for target in members}
            if twice:
                raise RecipeError(f"groups.{i}: {min(twice)} is in it by itself and as part of the FFN {ffn.name}")
        groups.append(members)
    return groups


def shipped() -> dict[str, str]:
    """Names and one-line descriptions of the recipes in the package."""
    return {name: yaml.safe_load(file.read_text(encoding="utf-8"))["about"] for name, file in _files().items()}


def _files() -> dict[str, Traversable]:
    """The recipes in the package by name, in the order of their names."""
    folder = importlib.resources.files("spectrim") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file for file in files}


def read(name: str) -> dict[str, Any]:
    """The YAML of a shipped recipe, or of a file. Raises RecipeError if there is neither."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise RecipeError(f"no such recipe file: {name}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{name} cannot be read: {error}") from error
    elif name in (known := _files()):
        text = known[name].read_text(encoding="utf-8")
    else:
        raise RecipeError(f"unknown recipe {name!r}: {registry.nearest(name, known.keys())}")
    data = _parsed(text, name)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{name}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return data


# What the YAML reader raises: of its own, and where a value is no number, date or list of its kind (2001-99-99).
_NO_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


def _parsed(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise RecipeError(f"{name} is nested too deeply") from error
    except _NO_YAML as error:
        raise RecipeError(f"{name} is no YAML: {error}") from error


def assign(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b.c` of nested recipe data; numbers index lists. Raises RecipeError for a step that is not there."""
    *steps, last = path.split(".")
    place: Any = data
    for step in steps:
        place = _step(place, step, path)
    if isinstance(place, list):
        _step(place, last, path)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"cannot set {path!r}: {'.'.join(steps)} is {_short(place)}, not a mapping")


def _step(place: Any, step: str, path: str) -> Any:
    if isinstance(place, list):
        if re.fullmatch(r"[0-9]{1,9}", step) is None or int(step) >= len(place):
            raise RecipeError(f"cannot set {path!r}: {step!r} is no index of a list of {len(place)}")
        return place[int(step)]
    if not isinstance(place, dict):
        raise RecipeError(f"cannot set {path!r}: {step!r} is below {_short(place)}, which is not a mapping")
    return place.setdefault(step, {})


def build(recipe: str | Recipe, shortcuts: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> Recipe:
    """A recipe (its name or file, or one made already) with the command line's shortcuts and `a.b=c` settings.

    shortcuts: ratio and format (of every group), sequences, length and seed, tokens (of the tuning); None values change
    nothing.
    Raises RecipeError, naming the key, for anything unknown or out of range.
    """
    name = recipe if isinstance(recipe, str) else "given"
    data = recipe.model_dump() if isinstance(recipe, Recipe) else read(recipe)
    for key, value in (shortcuts or {}).items():
        if value is None:
            continue
        if key == "tokens":
            _tunes(data, name)
            assign(data, "tune.tokens", value)
        elif key in Calibrate.model_fields:
            assign(data, f"calibrate.{key}", value)
        else:
            groups = data.get("groups")
            for i in range(len(groups) if isinstance(groups, list) else 0):
                assign(data, f"groups.{i}.{key}", value)
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting!r}: write it as key.key=value")
        assign(data, path, _parsed(value, f"--set {setting!r}: the value"))
    return validated(data, name)


def _tunes(data: Mapping[str, Any], name: str) -> None:
    """Raise RecipeError where a recipe has no tuning."""
    if data.get("tune") is None:
        known = [shipped for shipped in _files() if read(shipped).get("tune") is not None]
        raise RecipeError(
            f"tokens are given, but the recipe {name} has no section `tune`, so nothing is tuned; recipes that have "
            f"one: {', '.join(known)}"
        )


def validated(data: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of its data; every method named in it is built once, so that a wrong setting is found now."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {_explain(error)}") from error
    for group in recipe.groups:
        recipe.allocator(group)
        for method in group.decompose:
            _built("decomposer", registry.decomposers(), method)
    if recipe.tune is not None:
        recipe.tune.way()
    return recipe


_KEYS: dict[str, Sequence[str]] = {
    "calibrate": list(Calibrate.model_fields),
    "tune": list(Tune.model_fields),
    "groups": list(Group.model_fields),
    "": list(Recipe.model_fields),
}


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _KEYS[str(problem["loc"][0]) if len(problem["loc"]) > 1 else ""]
        return f"unknown key {where}: {registry.nearest(str(problem['loc'][-1]), known)}"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}, given {_short(problem['input'])}"


def _short(value: Any) -> str:
    """A value as in Python, cut short: of few lines, YAML makes structures that fill the memory once written out."""
    shown = reprlib.Repr()
    shown.maxlevel = 3
    shown.maxstring = shown.maxother = shown.maxlong = 200
    return shown.repr(value)
