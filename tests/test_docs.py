"""What the documents and examples say is run: every `$ spectrim …` line and every Python block, in order."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from spectrim.cli import app
from spectrim.core import registry
from spectrim.recipe import Recipe, shipped
from spectrim.recipe import build as build_recipe

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```(console|python|yaml)\n(.*?)```", re.DOTALL)
FLAGS = re.compile(r"--[a-z][a-z-]+")
PAGES = ["README.md", "docs/quickstart.md", "docs/large-models.md", "docs/compare.md", "docs/comparison.md"]
PAGES += ["docs/sizes.md", "docs/calibration.md"]
PAGES += [f"docs/methods/{page.name}" for page in sorted((ROOT / "docs/methods").glob("*.md"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the two texts that the documents name."""
    assets = ROOT / "src/spectrim/assets"
    rows = (assets / "reference_calibration.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(rows[:80]), encoding="utf-8")
    rows = (assets / "reference_evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.txt").write_text("\n".join(rows[:12]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_document(name: str) -> int:
    """Run a document's commands and Python blocks; how many there were."""
    done = 0
    for kind, block in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
        if kind == "console":
            for line in block.splitlines():
                command = line.partition("$ ")[2].partition(" #")[0].replace("MODEL", "reference")
                if command.startswith("spectrim "):
                    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
                    assert result.exit_code == 0, (command, result.output)
                    done += 1
        elif kind == "python":
            module = ModuleType("document")
            sys.modules["document"] = module  # dataclasses look their module up there
            exec(compile(block, name, "exec"), module.__dict__)
            done += 1
    return done


@pytest.mark.usefixtures("folder")
def test_the_plan_of_a_large_model_is_what_the_page_says() -> None:
    """From a configuration alone; every figure of the page's two last tables, and the note."""
    page = (ROOT / "docs/large-models.md").read_text(encoding="utf-8")
    code, shown = (
        next(block for kind, block in BLOCK.findall(page) if kind == wanted) for wanted in ("python", "console")
    )
    exec(compile(code, "large-models", "exec"), {})
    command, *lines = shown.splitlines()
    found = CliRunner().invoke(app, [*shlex.split(command)[2:], "--json"], catch_exceptions=False)
    said = json.loads(found.stdout)
    table = {cells[0]: cells[1:] for cells in (re.findall(r"[^│]+", line) for line in lines if line.startswith("│"))}
    cells = {name.strip(): [value.strip() for value in values] for name, values in table.items()}
    assert cells["model.layers.0.self_attn.k_proj"][:2] == ["k", "1024 × 8192"]
    assert {name: f"{count:,}" for name, count in said["parameters"].items()} == {
        name: cells[name][0] for name in said["parameters"]
    }
    for name, stage in said["stages"].items():
        sizes = [sum(stage["memory_bytes"].values()), stage["disk_bytes"]]
        assert cells[name] == [f"{size / 1e9:.2f} GB" for size in sizes]
    assert set(said["notes"]) <= set(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_quickstart_runs() -> None:
    assert run_document("docs/quickstart.md") >= 7


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_compare_runs() -> None:
    assert run_document("docs/compare.md") == 4


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_sizes_runs() -> None:
    assert run_document("docs/sizes.md") == 5


@pytest.mark.usefixtures("folder")
def test_add_a_method_runs_and_its_recipe_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_decomposers", dict(registry.decomposers()))
    assert run_document("docs/add-a-method.md") == 1
    blocks = [
        block
        for kind, block in BLOCK.findall((ROOT / "docs/add-a-method.md").read_text(encoding="utf-8"))
        if kind == "yaml"
    ]
    group = Recipe.model_validate(yaml.safe_load(blocks[0])).groups[0]
    assert registry.build("decomposer", registry.decomposers(), "peak_weighted_svd", group.decompose[0].settings)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["compress_and_load.py", "mixed_recipe.py"])
def test_examples_run(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, str(folder)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert "parameters" in capsys.readouterr().out or script == "mixed_recipe.py"


@pytest.mark.parametrize("name", PAGES)
def test_flags_and_recipes_in_commands_exist(name: str) -> None:
    known = set()
    for command in app.registered_commands:
        assert command.callback is not None
        help_text = CliRunner().invoke(app, [command.callback.__name__, "--help"], env={"COLUMNS": "200"}).output
        known |= set(FLAGS.findall(help_text))
    text = (ROOT / name).read_text(encoding="utf-8")
    # what comes before is torchrun's
    commands = [line.split("-m spectrim ")[-1] for line in text.splitlines() if "spectrim " in line and "--" in line]
    used = {flag for line in commands for flag in FLAGS.findall(line)}
    assert used <= known, used - known
    for recipe in re.findall(r"--recipe ([a-z-]+)", text):
        assert recipe in shipped()
        build_recipe(recipe)


def test_links_of_documents_lead_somewhere() -> None:
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (file.parent / link).exists(), (file.name, link)
