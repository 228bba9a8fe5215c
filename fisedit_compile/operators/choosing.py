"""How often each way to compute an operator was taken."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Taken(threading.local):
    """How often each way was taken in this thread, since somebody last asked."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, way: str) -> None:
        """Count a way."""
        self._counts[way] += 1

    def add(self, counts: Mapping[str, int]) -> None:
        """Count several ways."""
        self._counts.update(counts)

    @contextmanager
    def apart(self) -> Iterator[Counter[str]]:
        """Count what is taken inside by itself; the counts are what is yielded."""
        before, self._counts = self._counts, Counter()
        try:
            yield self._counts
        finally:
            self._counts = before

    def drain(self) -> Counter[str]:
        """The counts, which begin anew."""
        counts, self._counts = self._counts, Counter()
        return counts


taken = Taken()
