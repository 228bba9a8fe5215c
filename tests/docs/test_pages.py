"""The documentation says what the code says: options, errors, examples, paths, drawings, pages."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fisedit_compile import EditSession, Runtime, errors
from fisedit_compile.cli.main import app
from fisedit_compile.options import MODES, VALID_OPTIONS, parse_options
from fisedit_compile.pipelines import AutomaticMask
from support.tree import ROOT, dotted_names, imports, modules

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), ROOT / "passes" / "README.md", ROOT / "CONTRIBUTING.md"])


def table_rows(text: str) -> Iterator[list[str]]:
    """Cells of all rows of tables, headings and rules left out."""
    previous = ""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---") and previous.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]
        previous = line


def documented_options() -> dict[str, set[str]]:
    """Names of options by where they are set, from docs/options.md."""
    found: dict[str, set[str]] = defaultdict(set)
    for cells in table_rows((DOCS / "options.md").read_text(encoding="utf-8")):
        assert len(cells) == 4, cells
        (name,) = re.findall(r"`([^`]+)`", cells[0])
        for place in re.findall(r"`([^`]+)`", cells[1]):
            for single in (f"fisedit bench {kind}" for kind in ("unet", "edit", "ablation")):
                if place == "fisedit bench":
                    assert name not in found[single], name
                    found[single].add(name)
            if place != "fisedit bench":
                assert name not in found[place], name
                found[place].add(name)
    return dict(found)


def arguments(function: Any) -> set[str]:
    """Names of what can be given to a function, but for the object itself and further arguments."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind not in kinds} - {"self"}


def command_options(command: Any, name: str) -> Mapping[str, set[str]]:
    """Long options of a command and of those inside of it."""
    own = {
        text
        for parameter in command.params
        for text in getattr(parameter, "opts", ())
        if text.startswith("--") and text not in ("--help", "--install-completion", "--show-completion")
    }
    found = {name: own} if own else {}
    for inner, sub in getattr(command, "commands", {}).items():
        found |= command_options(sub, f"{name} {inner}")
    return found


def environment_variables() -> set[str]:
    """Variables of the environment that the sources name."""
    folders = [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    texts = (path.read_text(encoding="utf-8") for path in folders if path != Path(__file__))
    return {name for text in texts for name in re.findall(r"\bFISEDIT_[A-Z_]+\b", text)}


def test_the_table_of_options_is_complete() -> None:
    expected = {
        "backend": {*VALID_OPTIONS, "mode"},
        "Runtime": arguments(Runtime.__init__),
        "Runtime.record": arguments(Runtime.record),
        "Runtime.edit": arguments(Runtime.edit),
        "EditSession": arguments(EditSession.__init__) - {"pipe"},
        "EditSession.edit": arguments(EditSession.edit),
        "AutomaticMask": {field.name for field in fields(AutomaticMask)},
        "environment": environment_variables(),
        **command_options(typer.main.get_command(app), "fisedit"),
    }
    assert documented_options() == expected


def test_documented_values_of_the_backend_are_accepted() -> None:
    accepted = 0
    for cells in table_rows((DOCS / "options.md").read_text(encoding="utf-8")):
        name = cells[0].strip("`")
        if "`backend`" not in cells[1] or name in ("runtime", "disable_passes"):
            continue
        for text in re.findall(r"`([^`]+)`", cells[2]):
            value = text if re.fullmatch(r"[a-z-]+", text) else ast.literal_eval(text)
            if name == "mode":
                assert value in MODES
                parse_options(value, {})
            else:
                parse_options(None, {name: value})
            accepted += 1
    assert accepted > 15


def error_classes() -> list[type[errors.FisEditError]]:
    found = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [value for value in found if issubclass(value, errors.FisEditError)]


def test_the_catalogue_explains_every_error() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [kind.__name__ for kind in error_classes()]
    sections = dict(re.findall(r"^## (\w+)\n\n`(\w+)`", text, re.MULTILINE))
    for kind in error_classes():
        builtin = next(parent for parent in kind.__mro__ if parent.__module__ == "builtins")
        assert sections[kind.__name__] == builtin.__name__


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_tracebacks_lead_to_the_catalogue(kind: type[errors.FisEditError]) -> None:
    error = kind("diffusers", "tests") if kind is errors.MissingPackageError else kind("what was expected")
    notes = getattr(error, "__notes__", [])
    if kind is errors.GraphError:
        assert notes == []
        return
    (note,) = notes
    page, _, anchor = note.rpartition(" ")[2].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings] and anchor == kind.__name__.lower()
    assert note not in str(error)


def test_derived_errors_are_explained_with_their_parents() -> None:
    class Derived(errors.BudgetError):
        pass

    assert errors.catalogue_entry(Derived) == "docs/errors.md#budgeterror"


def code_blocks(path: Path) -> list[str]:
    """The Python code of a page; what was typed, where an interpreter's answers are shown too."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return ["\n".join(re.findall(r"^>>> (.*)$", block, re.MULTILINE)) or block for block in blocks]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_import_what_exists(path: Path, tmp_path: Path) -> None:
    made = tuple(module_of(name) for name in made_files(path))
    for number, code in enumerate(code_blocks(path)):
        file = tmp_path / f"block{number}.py"
        file.write_text(code, encoding="utf-8")
        for found in imports("block", file):
            if not found.name.startswith(made):
                check_name(found.name)
        for used in dotted_names(file):
            if used.name.startswith("fisedit."):
                check_name(used.name.replace("fisedit.", "fisedit_compile.", 1))


def made_files(path: Path) -> list[str]:
    """Files that a page tells its reader to make: their names begin a line."""
    found = re.findall(r"^`([\w/]+\.py)`", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in found if not (ROOT / name).exists()]


def module_of(name: str) -> str:
    """The installed module of a file of the tree."""
    inner = name.removeprefix("fisedit_compile/").removesuffix(".py").replace("/", ".")
    return f"fisedit_compile.{inner}"


def test_files_that_pages_make_are_not_there() -> None:
    made = made_files(DOCS / "adding-an-operator.md")
    assert [module_of(name) for name in made if not name.startswith("tests/")] == [
        "fisedit_compile.passes.sparsify.gate",
        "fisedit_compile.operators.rows.taking",
    ]


def check_name(name: str) -> None:
    """Fail where a dotted name is neither a module nor in one."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:count]))
        found = getattr(found, part)


def test_examples_are_found() -> None:
    assert sum(len(code_blocks(path)) for path in PAGES) > 10


def test_the_tutorial_runs(tmp_path: Path) -> None:
    """With a few steps, of which there would be more to see."""
    program = "\n".join(code_blocks(DOCS / "tutorial.md"))
    assert "num_inference_steps=20," in program
    program = program.replace("num_inference_steps=20,", "num_inference_steps=4,")
    environment = os.environ | {"FISEDIT_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "blue.png").stat().st_size > 1000
    assert "speed-up" in done.stdout and "sparse share" in done.stdout


#: Folders in which documents name files without repeating the folder.
NAMED_FROM = (
    "",
    "docs",
    "fisedit_compile",
    "fisedit_compile/operators",
    "fisedit_compile/pipelines",
    "passes",
    "runtime",
    "tests",
    "tests/support",
)
#: Files that commands write or read, and files that stand for many.
NOT_IN_THE_TREE = re.compile(
    r"blocks\.json|gpu\.(json|md)|flow\.json|\.json|model_index\.json|report\.json|unet/config\.json|fisedit-demo/.*|.*<.*|native\.cpp|docs/images/"
    r"|(settings|table)\.json|pictures/"
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_documents_exist(path: Path) -> None:
    made = made_files(path)
    for name in re.findall(r"`([\w./*<>-]+)`", path.read_text(encoding="utf-8")):
        if name in made:
            continue
        if "/" not in name and not name.endswith((".py", ".md", ".cpp", ".json", ".txt")):
            continue
        if NOT_IN_THE_TREE.fullmatch(name):
            continue
        if name.endswith((".py", ".md")) and "/" not in name and "*" not in name:
            assert list(ROOT.rglob(name)), f"{path.name}: {name}"
        else:
            assert any(list(ROOT.glob(f"{folder}/{name}".strip("/"))) for folder in NAMED_FROM), f"{path.name}: {name}"


def test_every_page_has_a_place_in_the_site() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"[\w-]+\.md", config[config.index("\nnav:") :])
    elsewhere = {"results.md", "passes.md", "contributing.md", "changelog.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in DOCS.glob("*.md")} | elsewhere


def test_drawings_are_what_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / "draw_concepts.py"), str(tmp_path)], check=True)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert len(drawn) == 4
    for name, text in drawn.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == text, name
        assert f"images/{name}" in (DOCS / "concepts.md").read_text(encoding="utf-8")
