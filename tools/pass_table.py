"""Write the table of passes into docs/architecture.md, from the list that runs them and the docstrings of their files.

python tools/pass_table.py            # write it
python tools/pass_table.py --check    # say whether it is as written, and leave it alone
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from fisedit_compile.passes.manager import PASSES, Pass

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- the passes: written by tools/pass_table.py -->", "<!-- end of the passes -->"


def summary(step: Pass) -> str:
    """What a pass does: the first paragraph of its file, and when it runs."""
    written = inspect.getdoc(sys.modules[step.run.__module__]) or ""
    text = written.partition("\n\n")[0].replace("\n", " ").replace("``", "`")
    conditions = " and ".join(condition.text for condition in step.only)
    return f"{text} Only {conditions}." if conditions else text


def table() -> str:
    """The passes in their order, as a table in Markdown."""
    lines = ["| pass | file | changes | may be left out | what it does |", "| --- | --- | --- | --- | --- |"]
    for step in PASSES:
        changes, optional = " and ".join(step.works_on), "yes" if step.optional else ""
        lines.append(f"| `{step.name}` | `passes/{step.file}` | {changes} | {optional} | {summary(step)} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """A document with the table as it has to be.

    Raises:
        ValueError: the document has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}, between which the table of passes stands")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the table; 1 when a check finds another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where the table is another one")
    check = parser.parse_args(arguments).check
    before = DOCUMENT.read_text(encoding="utf-8")
    after = updated(before)
    if check and before != after:
        print(f"{DOCUMENT} has another table of passes; python tools/pass_table.py writes it")
        return 1
    if not check:
        DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
