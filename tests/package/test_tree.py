"""Rules for all files, and what README.md promises."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from support.tree import FOLDERS, ROOT, modules

SOURCES = sorted(
    path
    for folder in (*FOLDERS, "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
MOST_LINES = 400
#: Files that a reader looks for one thing in, which splitting would spread: how many lines each may have.
LONGER = {
    "fisedit_compile/executing/executable.py": 420,  # what a graph does inside record and edit
    "fisedit_compile/operators/convolution/spec.py": 460,  # all convolutions, their arguments and cases
    "fisedit_compile/tracing/trace.py": 410,  # from Dynamo's graph to ATen
    "passes/domains/geometry/movement.py": 410,  # one rule after the other
    "runtime/phases.py": 460,  # what a graph asks during record and edit
}


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_all_sources_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {*FOLDERS, "tests", "benchmarks"}
    assert len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_finished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= LONGER.get(str(path.relative_to(ROOT)), MOST_LINES), f"{lines} lines"
    if path != Path(__file__):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert not re.search(r"^\s*(import pickle|from pickle)", text, re.MULTILINE)


def test_the_top_level_folders_are_linked_into_the_package() -> None:
    for folder, package in FOLDERS.items():
        if "." not in package:
            continue
        link = ROOT / Path(*package.split("."))
        assert link.is_symlink() and link.readlink() == Path("..", folder)


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in modules().values()}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    assert len(folders) > 20


def requirement_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_every_direct_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = [requirement_name(line) for line in lines]
    assert len(set(pinned)) == len(pinned)
    project = read_project()["project"]
    wanted = {requirement_name(text) for text in project["dependencies"]}
    for extra in ("test", "plot", "eval", "docs"):
        wanted |= {requirement_name(text) for text in project["optional-dependencies"][extra]}
    assert wanted - {"triton"} <= set(pinned)
    # Builds of PyTorch bring their own.
    assert "triton" not in pinned and not any(name.startswith("nvidia") for name in pinned)


TEST_LINE = 'pip install -c constraints.txt -e ".[test]" && pytest'
DEMO_LINE = "pip install -c constraints.txt . && fisedit demo"


@pytest.mark.parametrize("line", [TEST_LINE, DEMO_LINE])
def test_readme_has_the_two_lines(line: str) -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines().count(line) == 1


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "passes").glob("*.md")]
    assert len(documents) >= 6
    for document in [*documents, *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_check_script_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert "readme_line pytest" in text and "readme_line 'fisedit demo'" in text
    subprocess.run(["bash", "-n", str(script)], check=True)
