"""The documents show the passes in the order in which they run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pass_table
from fisedit_compile.options import Options
from fisedit_compile.passes.manager import PASSES, families
from support.tree import ROOT

NAMES = [step.name for step in PASSES]


def test_the_table_of_the_architecture_is_as_written() -> None:
    assert pass_table.main(["--check"]) == 0, "run python tools/pass_table.py"


def test_another_table_is_found_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "architecture.md"
    document.write_text(pass_table.DOCUMENT.read_text(encoding="utf-8").replace("`canonicalize`", "`canonical`"))
    monkeypatch.setattr(pass_table, "DOCUMENT", document)
    assert pass_table.main(["--check"]) == 1
    assert pass_table.main([]) == 0 and pass_table.main(["--check"]) == 0
    assert "`canonical`" not in document.read_text(encoding="utf-8")


def test_a_document_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="between which the table of passes stands"):
        pass_table.updated("no table\n")


def test_what_passes_hold_is_listed_in_their_order() -> None:
    text = (ROOT / "passes" / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Stages\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z_, ]+) \|", section, re.MULTILINE)
    assert rows[0] == "pass"
    assert [name for row in rows[1:] for name in row.split(", ")] == NAMES


def test_each_family_has_the_pass_of_its_name() -> None:
    assert {family.name for family in families(Options())} < set(NAMES)
