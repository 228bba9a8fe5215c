"""Fetch the wheels that a machine without a network lacks, as `constraints.txt` pins them.

    python tools/fetch_wheels.py --python 3.12 --installed there.txt --output wheels

``there.txt`` is what ``pip list --format freeze`` prints there. PyTorch and what it brings are never fetched. There:

    python -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parents[1]
#: Built for one kind of machine: they must be there.
BROUGHT = frozenset({"torch", "triton"})
#: Of the C library, newest first: what is fetched runs where glibc is at least 2.28.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def names_of(lines: Sequence[str]) -> set[str]:
    """Names of the packages in lines such as ``numpy==2.4.0``."""
    return {
        canonicalize_name(Requirement(line).name) for line in lines if line.strip() and line.lstrip()[0] not in "#-"
    }


def missing(constraints: Sequence[str], installed: Sequence[str]) -> list[str]:
    """Lines of the constraints whose packages are not installed."""
    there = names_of(installed) | BROUGHT
    return [
        line
        for line in constraints
        if line and line[0] != "#" and canonicalize_name(Requirement(line).name) not in there
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; pip's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--installed", type=Path, required=True, help="what pip lists there")
    parser.add_argument("--output", type=Path, default=Path("wheels"))
    chosen = parser.parse_args(arguments)
    constraints = (FOLDER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = missing(constraints, chosen.installed.read_text(encoding="utf-8").splitlines())
    if not wanted:
        print("nothing is missing")
        return 0
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", chosen.python, *(part for name in PLATFORMS for part in ("--platform", name))]
    return subprocess.run([*command, "--dest", str(chosen.output), *wanted], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
