"""Accuracies on multiple-choice tasks, by lm-eval (extra `eval`): its own tasks, and local files of questions.

A local file is .jsonl, its rows all of one form:
choices: {"query", "choices": [...], "gold": index}, each choice scored after the query; a query that holds "Question:"
    and does not end in "Answer:" gets a line with that.
contexts: {"context_options": [...], "continuation", "gold": index}, the same continuation scored after each context.
lm-eval reads them through its task configuration, scores and counts: acc by summed log-likelihood, acc_norm by that a
letter of the choice (not for contexts, where the scored text is the same).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 8
_METRICS = ("acc", "acc_norm")
_ANSWER = "{% if 'Question:' in query and not query.rstrip().endswith('Answer:') %}{{'\\n'}}Answer:{% endif %}"
_QUERY = "{{query.rstrip()}}" + _ANSWER
_CHOICES = {"doc_to_text": _QUERY, "doc_to_choice": "choices", "doc_to_target": "gold"}
_CONTEXTS = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}


def check(tasks: Sequence[str]) -> None:
    """Raise ValueError for a name that lm-eval does not know, a file that cannot be used, or without lm-eval."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-eval: pip install 'spectrim[eval]'")
    names = [task_name(task) for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"two of --tasks would be named alike: {', '.join(sorted(names))}")
    for task in tasks:
        if _is_file(task):
            _form(Path(task))
    foreign = {task for task in tasks if not _is_file(task)}
    if foreign:
        from lm_eval.tasks import TaskManager

        unknown = sorted(foreign.difference(TaskManager().all_tasks))
        if unknown:
            raise ValueError(f"no task of lm-eval and no .jsonl file: {', '.join(unknown)}")


def fingerprint(tasks: Sequence[str]) -> list[list[str]]:
    """What decides the questions: name and, of a local file, sha256."""
    return [[t, hashlib.sha256(Path(t).read_bytes()).hexdigest() if _is_file(t) else "lm-eval"] for t in tasks]


def task_name(task: str) -> str:
    """What a task is called in tables: lm-eval's name, or that of the file."""
    return Path(task).stem if _is_file(task) else task


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """acc, acc_norm and their standard errors of every task (a group of lm-eval: of its members too), zero-shot.

    tasks: as `check` lets them pass. Raises ValueError for one without accuracy.
    """
    if not tasks:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(_is_file(task) for task in tasks))
    with tempfile.TemporaryDirectory(prefix="spectrim-tasks-") as cache:
        asked = [_configured(Path(task), cache) if _is_file(task) else task for task in tasks]
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH), tasks=asked, num_fewshot=0,
            task_manager=manager, log_samples=False, bootstrap_iters=100,  # for what is no mean; none of ours
        )  # fmt: skip
    assert found is not None
    scores = {name: dict(_scores(values)) for name, values in found["results"].items()}
    without = [name for name, values in scores.items() if not values]
    if without:
        raise ValueError(f"lm-eval gives no accuracy for {', '.join(without)}: choose multiple-choice tasks")
    return scores


def _scores(values: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """lm-eval's keys are `metric,filter`; an error that it cannot say is the text N/A."""
    for metric in _METRICS:
        if f"{metric},none" in values:
            error = values.get(f"{metric}_stderr,none")
            yield metric, float(values[f"{metric},none"])
            yield f"{metric}_stderr", float(error) if isinstance(error, (int, float)) else None


def _configured(path: Path, cache: str) -> dict[str, Any]:
    """lm-eval's configuration of a local file; what `datasets` makes of it lies in `cache`."""
    form = _form(path)
    return {
        "task": task_name(str(path)),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}, "cache_dir": cache},
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (_METRICS if form is _CHOICES else _METRICS[:1])
        ],
        **form,
    }


def _is_file(task: str) -> bool:
    return task.endswith(".jsonl")


def _form(path: Path) -> Mapping[str, str]:
    """Which form a file's rows have. Raises ValueError, naming the line, for a row of neither or of another."""
    if not path.is_file():
        raise ValueError(f"no such file of questions: {path}")
    form = None
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            found = _form_of(line, f"{path}, line {number}")
            if form is not None and form is not found:
                raise ValueError(f"{path}, line {number}: another form of row than before")
            form = found
    if form is None:
        raise ValueError(f"{path}: holds no question")
    return form


def _form_of(line: str, where: str) -> Mapping[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    for form, text, options in ((_CHOICES, "query", "choices"), (_CONTEXTS, "continuation", "context_options")):
        if isinstance(row, Mapping) and {text, options, "gold"} <= row.keys():
            many, gold = row[options], row["gold"]
            strings = isinstance(many, list) and all(isinstance(one, str) and one for one in [*many, row[text]])
            if not strings or type(gold) is not int or not 0 <= gold < len(many) or len(many) < 2:
                raise ValueError(f"{where}: {options} must be 2 texts or more, gold the index of one, from 0")
            return form
    raise ValueError(f"{where}: neither query, choices and gold, nor context_options, continuation and gold")
