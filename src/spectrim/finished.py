"""Whether an output is what this very command makes: one killed right after its output was in place is run again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spectrim.core.plan import Plan
from spectrim.core.store import hash_of
from spectrim.driving import text_hash
from spectrim.model import writer
from spectrim.model.apply import SIDE_FILES
from spectrim.model.checkpoint import Checkpoint
from spectrim.model.files import file_hash
from spectrim.recipe import Recipe
from spectrim.run import Run, named

logger = logging.getLogger(__name__)

SUMMARY, FACTS = "spectrim.json", "run.json"


def record(directory: Path, request: str) -> dict[str, Any]:
    """What an output says of itself in `spectrim.json`: the request that it answers, and the sizes of its files."""
    return {"request": request, "files": _sizes(directory)}


def answer(out: Path, request: str) -> dict[str, Any] | None:
    """The summary of an output that answers the request and has the files that were written, None for any other."""
    summary = _summary(out)
    return summary if summary.get("request") == request and summary.get("files") == _sizes(out) else None


def refuse_filled(out: Path, overwrite: bool, alike: Callable[[Mapping[str, Any]], bool]) -> None:
    """As `writer.refuse_filled`, but for an output that may turn out to be the answer once the request is known.

    alike: whether the summary of an output is one of this command, as far as that can be seen at once.
    """
    writer.settle(out)
    summary = {} if overwrite else _summary(out)
    if "request" not in summary or not alike(summary):
        writer.refuse_filled(out, overwrite)


def of_recipe(asked: Recipe, wish: Mapping[str, Any] | None = None) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a summary is of a compression by that recipe, and of nothing that was done after it.

    wish: what else was asked for (`sizes.wish_of`); where that is a size, the ratio is no part of the recipe asked for.
    """
    wanted, size = hash_of(asked.model_dump(exclude_none=True)), (wish or {}).get("size")
    most = 0 if asked.tune is None else 1

    def alike(summary: Mapping[str, Any]) -> bool:
        right = summary.get("recipe_hash") == wanted if size is None else True
        tunings = summary.get("finetuning")
        return right and summary.get("size") == size and (tunings is None or 0 < len(tunings) <= most)

    return alike


def request_of(run: Run, wish: Mapping[str, Any] | None = None) -> str:
    """All that decides what a compression writes, as a hash; the ratio, format and methods are in the recipe.

    wish: as for `of_recipe`.
    """
    assert isinstance(run.source, Checkpoint)
    return hash_of(
        {
            "weights": run.fingerprint, "beside": beside(run.source.directory, (SUMMARY, FACTS)),
            "text": [text_hash(windows) for windows in (run.windows, run.select, run.accept)],
            "recipe": run.asked.model_dump(exclude_none=True), "device": run.device.type,
            # with what the recipe leaves open decided
            "decomposers": {name: named(each) for name, each in run.decomposers.items()},
            "computed": str(run.source.model.dtype), "stored": str(run.dtype),
            "versions": {name: version(name) for name in ("spectrim", "torch", "transformers", "safetensors")},
            **(wish or {}),
            **({} if run.tuned_on is None else {"tuned_on": run.tuned_on}),
        }
    )  # fmt: skip


def beside(directory: Path, but: Sequence[str] = (FACTS,)) -> str:
    """A hash of what lies beside a model's weights and goes with them, but for files of these names."""
    found = {file.name: file for pattern in SIDE_FILES for file in directory.glob(pattern) if file.name not in but}
    return hash_of({name: file_hash([found[name]]) for name in sorted(found)})


def facts(out: Path) -> dict[str, Any]:
    """What the run that made an output took."""
    return _json(out / FACTS)


def compressed(
    run: Run, out: str | Path | None, overwrite: bool, wish: Mapping[str, Any] | None = None
) -> tuple[Plan, dict[str, Any], dict[str, Any]] | None:
    """Plan, summary and facts of an output that is the finished result of this run, None where there is none yet.

    Raises ValueError, as `writer.refuse_filled`, for an output that holds anything else.
    """
    if out is None or overwrite or not _summary(Path(out)):
        return None
    found = answer(Path(out), request_of(run, wish))
    if found is None:
        writer.refuse_filled(Path(out), overwrite)
        return None
    logger.warning("%s holds the result of this command already; with --overwrite it is made anew", out)
    return Plan.from_json(found["plan"]), found, facts(Path(out))


def _summary(out: Path) -> dict[str, Any]:
    return _json(out / SUMMARY)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file of an output but of what describes it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return {name: path.stat().st_size for name, path in names.items() if name not in (SUMMARY, FACTS)}
