"""What is installed is what is imported, in both directions; and the library works with few packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from support.tree import PACKAGE, ROOT, imports, modules

#: Packages that are imported under other names than those under which they are installed.
IMPORTED_AS = {"griffelib": "griffe", "pillow": "PIL"}
#: What scripts compare with or try out, where somebody installed it.
TRIED_OUT = {"sige", "torchvision"}
#: Folders of scripts, which import each other by their bare names.
SCRIPTS = ("tools", "benchmarks", "examples", "docs")
#: Packages of extras that are commands, plugins or used through another package, and where that shows.
NOT_IMPORTED = {
    "build": "tests/package/test_wheel.py",
    "mkdocs-material": "mkdocs.yml",
    "mkdocstrings-python": "mkdocs.yml",
    "mypy": ".ci/run",
    "pytest-timeout": "pyproject.toml",
    "pytest-xdist": "pyproject.toml",
    "ruff": ".ci/run",
}


def read_project() -> dict[str, Any]:
    """The table ``project`` of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def names(requirements: Iterable[str]) -> set[str]:
    """The packages of requirements."""
    found = set()
    for requirement in requirements:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match is not None, requirement
        found.add(re.sub(r"[-_.]+", "-", match.group()).lower())
    return found


def extras() -> set[str]:
    """The packages of all extras, but for this one."""
    groups = read_project()["optional-dependencies"].values()
    return names(requirement for group in groups for requirement in group) - {"fisedit-compile"}


def foreign(paths: Iterable[tuple[str, Path]]) -> set[str]:
    """Top-level modules that files import and that are neither Python's nor this project's."""
    files = list(paths)
    scripts = {path.stem for _, path in files if path.parent.parent == ROOT and path.parent.name in SCRIPTS}
    found = {item.name.split(".")[0] for module, path in files for item in imports(module, path)}
    return found - {PACKAGE, "support"} - scripts - set(sys.stdlib_module_names)


def of_the_package() -> list[tuple[str, Path]]:
    return list(modules().items())


def of_the_rest() -> list[tuple[str, Path]]:
    found = [(path.stem, path) for folder in ("tests", *SCRIPTS) for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*found, ("setup", ROOT / "setup.py")]


def as_imported(packages: Iterable[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name) for name in packages}


def test_the_package_imports_what_it_installs_and_nothing_else() -> None:
    installed = as_imported(names(read_project()["dependencies"]))
    groups = read_project()["optional-dependencies"]
    optional = as_imported(names([*groups["plot"], *groups["eval"]]))
    assert foreign(of_the_package()) - optional == installed
    assert optional <= foreign(of_the_package())


def test_the_packages_of_the_project_are_there() -> None:
    assert {"torch", "diffusers", "transformers", "triton", "numpy", "networkx"} <= names(
        read_project()["dependencies"]
    )


def test_tests_and_tools_import_what_their_extras_install() -> None:
    declared = as_imported(names(read_project()["dependencies"]) | extras())
    assert foreign(of_the_rest()) - declared == TRIED_OUT


def test_every_package_of_an_extra_is_used() -> None:
    imported = foreign([*of_the_package(), *of_the_rest()])
    unseen = {name for name in extras() if IMPORTED_AS.get(name, name) not in imported}
    assert unseen == set(NOT_IMPORTED)
    for name, place in NOT_IMPORTED.items():
        words = {name, name.removeprefix("mkdocs-"), name.removesuffix("-python"), name.removeprefix("pytest-")}
        # The plugin for parallel tests is told how many workers to start.
        words |= {"--dist loadfile"} if name == "pytest-xdist" else set()
        assert any(word in (ROOT / place).read_text(encoding="utf-8") for word in words), name


#: Hides packages as if they were not installed.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run_without(hidden: set[str], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process in which some packages are not there."""
    ast.parse(program)
    command = [sys.executable, "-c", HIDE.format(hidden=sorted(hidden)) + program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_backend_works_with_few_packages() -> None:
    program = """
import torch, fisedit_compile as fisedit
runtime = fisedit.Runtime()
layer = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
compiled = torch.compile(layer, backend="fisedit", options={"runtime": runtime})
picture, mask = torch.rand(1, 3, 6, 8), torch.zeros(6, 8)
mask[2:4, 3:5] = 1
with runtime.record("base"):
    before = compiled(picture)
with runtime.edit("base", mask=mask):
    after = compiled(picture + mask)
outside = mask == 0
assert torch.equal(after[..., outside], before[..., outside])
torch.testing.assert_close(after[..., ~outside], layer(picture + mask)[..., ~outside])
report = fisedit.explain(compiled, picture)
assert report.sparse_mac_fraction == 1.0
print(report)
"""
    done = run_without({"diffusers", "transformers", "tokenizers", "typer", "rich", "scipy", "matplotlib"}, program)
    assert done.returncode == 0, done.stderr
    assert "sparse share of the multiply-accumulates | 100.00 %" in done.stdout


@pytest.mark.parametrize(
    ("hidden", "program", "purpose"),
    [
        ("diffusers", "import fisedit_compile; fisedit_compile.EditSession", "edit sessions"),
        ("diffusers", "from fisedit_compile.pipelines import AutomaticMask", "edit sessions"),
        ("scipy", "import fisedit_compile; fisedit_compile.EditSession", "edit sessions"),
        ("diffusers", "from fisedit_compile.scenes import load_pipeline; load_pipeline()", "the scenes model"),
        ("transformers", "from fisedit_compile.scenes import load_pipeline; load_pipeline()", "the scenes model"),
        ("typer", "import fisedit_compile.cli.main", "the command line"),
        ("rich", "import fisedit_compile.cli.main", "the command line"),
    ],
)
def test_what_needs_a_package_says_which(hidden: str, program: str, purpose: str) -> None:
    done = run_without({hidden}, program)
    assert done.returncode == 1
    message = (
        f"MissingPackageError: the package {hidden} is not installed, which this needs: {purpose}; "
        f"run: pip install {hidden}"
    )
    assert message in done.stderr, done.stderr
