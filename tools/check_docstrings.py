"""Parse every docstring of the package as Google's style: ``python tools/check_docstrings.py``.

Arguments that are explained together (``key, value: ...``) may be. The package is read, not imported. Needs griffe,
which the extra ``docs`` installs.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fisedit_compile"
#: What griffe says of several arguments with one explanation.
TOGETHER = re.compile(r"[Pp]arameter '\w+(, \w+)+'")


class Complaints(logging.Handler):
    """Keeps what griffe says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that are defined in it."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias and isinstance(member, griffe.Object):
            yield from objects(member)


def check() -> list[str]:
    """What does not parse, each with its file and line."""
    complaints = Complaints()
    logger = logging.getLogger("griffe")
    logger.addHandler(complaints)
    package = griffe.load(PACKAGE, search_paths=[ROOT], docstring_parser="google")
    count = 0
    for found in objects(package):
        if found.docstring is None:
            continue
        count += 1
        found.docstring.parse("google")
        if found.docstring.value.lstrip().startswith(("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")):
            complaints.texts.append(f"{found.filepath}:{found.lineno}: {found.path} begins with a heading")
    if count < 500:
        complaints.texts.append(f"expected some hundred docstrings below {ROOT / PACKAGE}, got {count}")
    logger.removeHandler(complaints)
    return sorted({text for text in complaints.texts if not TOGETHER.search(text)})


if __name__ == "__main__":
    found = check()
    print("\n".join(found) or "all docstrings parse")
    sys.exit(1 if found else 0)
