"""What documents say can be done can be done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from support.tree import ROOT, installed_files


def copy_of_the_package(folder: Path) -> None:
    """All modules and sources, as they are installed."""
    for name, path in installed_files().items():
        if path.suffix in (".py", ".cpp", ".h"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def section(start: str, end: str) -> str:
    """A part of the page on adding an operator."""
    text = (ROOT / "docs" / "adding-an-operator.md").read_text(encoding="utf-8")
    return text[text.index(start) : text.index(end)]


def test_a_family_can_be_added_as_documented(tmp_path: Path) -> None:
    part = section("## An operator of PyTorch on rows", "## Another way to compute an operator")
    family, listed, tests = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    copy_of_the_package(tmp_path)
    package = tmp_path / "fisedit_compile" / "passes"
    assert not (package / "sparsify" / "gate.py").exists()
    (package / "sparsify" / "gate.py").write_text(family, encoding="utf-8")
    manager = (package / "manager.py").read_text(encoding="utf-8")
    imports, _, rest = listed.partition("PASSES = (")
    entry = next(line for line in rest.splitlines() if "sparsify_gate" in line)
    neighbour = '    Pass("sparsify_pointwise"'
    assert manager.count(neighbour) == 1 and manager.count("        POINTWISE,\n") == 1
    manager = manager.replace(neighbour, f"{entry}\n{neighbour}").replace(
        "        POINTWISE,\n", "        GATE,\n        POINTWISE,\n"
    )
    manager = manager.replace("\nlogger = ", f"\n{imports}\nlogger = ", 1)
    (package / "manager.py").write_text(manager, encoding="utf-8")
    (tmp_path / "test_gate.py").write_text(tests, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_gate.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT / "tests")))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


def test_an_implementation_can_be_added_as_documented(tmp_path: Path) -> None:
    part = section("## Another way to compute an operator", "## A new operator of edits")
    (file,) = re.findall(r"^`(\S+\.py)`:$", part, re.MULTILINE)
    source, program = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    copy_of_the_package(tmp_path)
    assert not (tmp_path / file).exists()
    (tmp_path / file).write_text(source, encoding="utf-8")
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["taking"]
