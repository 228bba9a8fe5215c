"""The wheel holds exactly the tree, and works where there is no checkout; a checkout works without installing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.tree import FOLDERS, PACKAGE, ROOT, installed_files, modules


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command elsewhere; what it prints comes back as text."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def copy_tree(folder: Path) -> Path:
    """A copy of what is built from, links and all: building leaves folders behind."""
    copy = folder / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(kind: str, source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Build a ``wheel`` or an ``sdist``."""
    command = (sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(output), str(source))
    return run(*command, folder=source.parent)


def members(wheel: Path) -> dict[str, bytes]:
    """What a wheel installs."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    built = build("wheel", copy_tree(folder), folder / "dist")
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel))
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    found = members(wheel)
    assert set(found) == set(installed_files())
    assert all(found[name] == path.read_bytes() for name, path in installed_files().items())


def test_a_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    packed = build("sdist", copy_tree(tmp_path), tmp_path / "dist")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    built = build("wheel", source, tmp_path / "wheels")
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (tmp_path / "wheels").glob("*.whl")
    assert members(path) == members(wheel)


def test_a_tree_without_links_builds_nothing(tmp_path: Path) -> None:
    copy = copy_tree(tmp_path)
    for name in ("passes", "runtime"):
        link = copy / PACKAGE / name
        link.unlink()
        # What git writes where it keeps no links, and what an archive of a repository unpacks to.
        link.write_text(f"../{name}")
    built = build("wheel", copy, tmp_path / "dist")
    assert built.returncode != 0
    assert "fisedit_compile/passes is no folder: expected a link to ../passes" in built.stdout + built.stderr
    assert not list((tmp_path / "dist").glob("*.whl"))


def test_the_wheel_names_its_license_and_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        information = {
            Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name
        }
    assert information["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in information["METADATA"]
    assert "Requires-Python: >=3.11" in information["METADATA"]
    points = information["entry_points.txt"].split()
    assert points == [
        *("[console_scripts]", "fisedit", "=", "fisedit_compile.cli.main:main"),
        *("[torch_dynamo_backends]", "fisedit", "=", "fisedit_compile.backend:fisedit"),
    ]


def test_an_installed_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = f"""
import importlib, pathlib, torch
for name in {sorted(modules())}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(installed)!r}), module.__file__
for bare in ("passes", "runtime"):
    try:
        importlib.import_module(bare)
    except ImportError:
        continue
    raise AssertionError(bare)
assert "fisedit" in torch.compiler.list_backends()
from fisedit_compile import EditSession, Runtime, default_runtime, explain
runtime = Runtime()
layer = torch.nn.Conv2d(3, 3, 3, padding=1)
compiled = torch.compile(layer, backend="fisedit", options={{"runtime": runtime}})
picture, mask = torch.rand(1, 3, 6, 8), torch.zeros(6, 8)
mask[2:4, 3:5] = 1
with torch.no_grad():
    with runtime.record("base"):
        before = compiled(picture)
    with runtime.edit("base", mask=mask):
        after = compiled(picture + mask)
outside = mask == 0
assert torch.equal(after[..., outside], before[..., outside])
torch.testing.assert_close(after[..., ~outside], layer(picture + mask)[..., ~outside])
print("works")
"""
    done = run(sys.executable, "-c", program, folder=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("works\n")


def test_a_checkout_works_without_installing(tmp_path: Path) -> None:
    program = "import fisedit_compile.passes, fisedit_compile.runtime as it; print(it.__file__)"
    done = run(sys.executable, "-c", program, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.strip() == str(ROOT / PACKAGE / "runtime" / "__init__.py"), done.stderr


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_the_folders_refuse_their_bare_names(name: str) -> None:
    done = run(sys.executable, "-c", f"import {name}", folder=ROOT)
    assert done.returncode != 0
    assert f"ImportError: import this package as {PACKAGE}.{name}" in done.stderr


def test_the_command_line_is_installed(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "fisedit")
    done = run(command, "--help", folder=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("demo", "generate", "edit", "bench", "explain"))
