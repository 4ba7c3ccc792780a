"""Who may import whom: the table of docs/architecture.md, section 3, read from the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "spectrim"

# The rooms of each layer: folders, and files that stand alone.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("data", "model"),
    ("calibrate", "learn", "measure.evaluate", "measure.speed"),
    ("methods", "finetune"),
    (
        "recipe", "jobs", "stored", "storage", "needs", "settling", "lean", "driving", "run", "second", "towards",
        "strength", "owntext", "planning", "timing", "finished", "sizes", "searching", "starting", "pipeline",
        "estimate", "saving", "tuning", "recovery",
    ),
    ("measure.compare", "measure.curve", "measure.plot", "measure.apart", "measure.zero_shot", "measure.report"),
    ("cli", "commands", "show", "__main__", "__init__"),
)  # fmt: skip
# Layer 3 sees of layer 2 only these.
SEEN_BY_METHODS = ("calibrate.statistics", "learn.gates", "learn.harden", "learn.training", "learn.tuning")
# Files without a folder of their own that may import each other.
TOGETHER = (
    frozenset(LAYERS[4]),
    frozenset(LAYERS[5]),
    frozenset(LAYERS[6]),
    frozenset({"measure.evaluate", "measure.speed"}),
)
# The registry has the methods register themselves, when it is first asked and not before.
LAZY_EXCEPTIONS = {("core.registry", "methods"), ("core.finetuner", "finetune")}

EXTRAS = {"datasets", "lm_eval", "peft", "optuna", "matplotlib", "pyarrow"}
# Shipped inside every checkpoint, where nothing else is at hand.
REMOTE_CODE = {"model.modules": set(), "model.quantizer": {"model.modules"}}


@dataclass(frozen=True)
class Import:
    """`file` imports `name`, a module (dotted, whole); `top`: when the file itself is imported."""

    file: str
    name: str
    line: int
    top: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def files() -> dict[str, Path]:
    """Every module by its name within the package; a folder's own file is `folder.__init__`."""
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


def _runs_at_import(tree: ast.Module) -> set[ast.AST]:
    """Nodes that are not inside a function; class bodies, `if` and `try` run at import."""
    found, todo = set(), list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        found.add(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return found


def imports(file: str, text: str, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of a file; `from package import module` is one of that module."""
    tree = ast.parse(text)
    at_import = _runs_at_import(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(file, node)
            whole = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if _own(name) and _file_of(name, known) else base for name in whole]
        else:
            continue
        for name in names:
            yield Import(file, name, node.lineno, node in at_import)


def _absolute(file: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = ["spectrim", *file.split(".")[:-1]]
    return ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])


def _own(name: str) -> bool:
    return name == "spectrim" or name.startswith("spectrim.")


def _file_of(name: str, known: dict[str, Path]) -> str | None:
    """The file of a module of ours: `a.b`, or `a.b.__init__` where that is a folder."""
    inside = name.removeprefix("spectrim").removeprefix(".")
    folder = f"{inside}.__init__".removeprefix(".")
    return inside if inside in known else folder if folder in known else None


def room(file: str) -> str:
    """The room a file is in: its folder, or itself where its folder spans several layers."""
    folder, _, _ = file.partition(".")
    rooms = {name for layer in LAYERS for name in layer}
    return file if file in rooms else folder


def layer(file: str) -> int:
    """The number of a file's layer."""
    (number,) = [i for i, rooms in enumerate(LAYERS) if room(file) in rooms]
    return number


def allowed(file: str, other: str) -> bool:
    """Whether the table lets `file` import the file `other`."""
    own, theirs = room(file), room(other)
    if own == "methods" and theirs == "methods":
        return file == "methods.__init__"
    if own == theirs:
        return True
    if any({own, theirs} <= together for together in TOGETHER):
        return True
    if layer(file) == 3 and layer(other) == 2:
        return other in SEEN_BY_METHODS
    return layer(other) < layer(file)


def _excepted(each: Import, other: str) -> bool:
    return not each.top and (each.file, room(other)) in LAZY_EXCEPTIONS


def broken(found: list[Import], known: dict[str, Path]) -> list[str]:
    """What breaks the table, in words."""
    wrong = []
    for each in found:
        if not _own(each.name):
            continue
        other = _file_of(each.name, known)
        assert other is not None, f"{each}, which is not there"
        if not _excepted(each, other) and not allowed(each.file, other):
            wrong.append(f"{each} (layer {layer(each.file)} imports layer {layer(other)})")
    return wrong


@pytest.fixture(scope="module")
def known() -> dict[str, Path]:
    # a folder that holds nothing yet is in no layer
    return {name: path for name, path in files().items() if path.read_text(encoding="utf-8") or "__init__" not in name}


@pytest.fixture(scope="module")
def everything(known: dict[str, Path]) -> list[Import]:
    return [found for name, path in known.items() for found in imports(name, path.read_text(encoding="utf-8"), known)]


def test_every_file_is_in_one_layer(known: dict[str, Path]) -> None:
    assert len(known) > 15
    for name in known:
        assert sum(room(name) in rooms for rooms in LAYERS) == 1, f"{name}: which layer is it on?"


def test_imports_go_down(everything: list[Import], known: dict[str, Path]) -> None:
    assert sum(_own(each.name) for each in everything) > 50
    assert broken(everything, known) == []


@pytest.mark.parametrize(
    ("file", "line", "right"),
    [
        ("core.plan", "import torch", True),
        ("core.plan", "from spectrim.core import budget", True),
        ("core.plan", "from spectrim.model.targets import find", False),
        ("core.plan", "def f():\n    from spectrim import recipe", False),
        ("core.plan", "import spectrim", False),
        ("core.registry", "def f():\n    import spectrim.methods", True),
        ("core.registry", "import spectrim.methods", False),
        ("data.text", "from spectrim.model import targets", False),
        ("data.text", "from ..model import targets", False),
        ("model.apply", "from . import targets", True),
        ("calibrate.streamed", "from spectrim.model import blocks", True),
        ("calibrate.streamed", "from spectrim.measure.evaluate import evaluate", False),
        ("measure.speed", "from spectrim.measure.evaluate import evaluate", True),
        ("methods.svd", "from spectrim.calibrate.statistics import Gram", True),
        ("methods.svd", "from spectrim.calibrate import collect", False),
        ("methods.svd", "from spectrim.measure import evaluate", False),
        ("methods.svd", "from spectrim.methods import other", False),
        ("methods.svd", "from . import other", False),
        ("methods.__init__", "from . import svd", True),
        ("recipe", "from spectrim import pipeline", True),
        ("recipe", "from spectrim import commands", False),
        ("cli", "from spectrim.pipeline import compress", True),
    ],
)
def test_the_check_sees(file: str, line: str, right: bool, known: dict[str, Path]) -> None:
    tree = {**known, "methods.other": Path()}
    assert (broken(list(imports(file, line, tree)), tree) == []) == right


def test_files_of_a_folder_import_each_other_without_cycles(everything: list[Import], known: dict[str, Path]) -> None:
    graph: dict[str, set[str]] = {name: set() for name in known}
    for each in everything:
        other = _file_of(each.name, known) if _own(each.name) else None
        # the package's own file only points at the others, and imports them when it is asked for a name
        if other is not None and "__init__" not in (each.file, other) and not _excepted(each, other):
            graph[each.file].add(other)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' → '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_core_never_imports_transformers(everything: list[Import]) -> None:
    wrong = [str(e) for e in everything if room(e.file) == "core" and e.name.partition(".")[0] == "transformers"]
    assert wrong == []


def test_extras_are_imported_where_they_are_needed(everything: list[Import]) -> None:
    assert [str(e) for e in everything if e.top and e.name.partition(".")[0] in EXTRAS] == []


def test_what_a_checkpoint_carries_needs_nothing_else(everything: list[Import]) -> None:
    outside = {"torch", "transformers"} | set(sys.stdlib_module_names)
    for file, ours in REMOTE_CODE.items():
        found = [e for e in everything if e.file == file]
        assert found, f"{file} has moved"
        for each in found:
            inside = {f"spectrim.{name}" for name in ours}
            assert each.name.partition(".")[0] in outside or each.name in inside, str(each)


@pytest.mark.parametrize("module", ["spectrim", "spectrim.cli"])
def test_importing_the_package_is_light(module: str) -> None:
    code = f"import sys, {module}; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def _imported_first(modules: list[str]) -> dict[str, str]:
    """The error of each module that fails as the first of the package to be imported, in a process of its own each."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *modules], capture_output=True, text=True, check=True, timeout=1800
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


# forked off one process that has torch, which none of these minds, and nothing of transformers
FIRST = """
import importlib, json, os, sys, traceback
import torch
failed = {}
for name in sys.argv[1:]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
            from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
            assert "spectrim" in AUTO_QUANTIZER_MAPPING, "not registered"
        except BaseException:
            os.write(write, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(write)
    said = b"".join(iter(lambda: os.read(read, 4096), b"")).decode()
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if said or code:
        failed[name] = said or f"exit code {code}"
print(json.dumps(failed))
"""


def test_the_quantizer_can_be_the_first_that_is_imported() -> None:
    """It wakes transformers, which has our hook import it: that is itself, half done."""
    assert _imported_first(["spectrim.model.quantizer"]) == {}


@pytest.mark.slow
def test_every_module_can_be_the_first_that_is_imported(known: dict[str, Path]) -> None:
    modules = [f"spectrim.{name}".removesuffix(".__init__") for name in known if name != "__main__"]
    assert len(modules) > 90 and _imported_first(modules) == {}


def test_the_public_names_are_there() -> None:
    import spectrim

    for name in spectrim.__all__:
        assert getattr(spectrim, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        spectrim.nothing  # noqa: B018
