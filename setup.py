"""Stops a build that would leave packages out: all settings are in pyproject.toml."""

from pathlib import Path

from setuptools import setup

for name in ("passes", "runtime"):
    if not (Path(__file__).parent / "fisedit_compile" / name / "__init__.py").is_file():
        raise SystemExit(
            f"fisedit_compile/{name} is no folder: expected a link to ../{name}. ZIP archives and some checkouts keep "
            "no links, and without them packages would be missing. Take the sdist, or clone with git "
            f"(core.symlinks=true), or make the link: rm -f fisedit_compile/{name} && ln -s ../{name} "
            f"fisedit_compile/{name}"
        )

setup()
