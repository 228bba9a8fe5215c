"""What is counted of the choices among implementations."""

from __future__ import annotations

import threading

from fisedit_compile.operators.choosing import taken


def test_what_was_taken_is_counted_for_each_thread() -> None:
    taken.drain()
    taken.note("operator: other")
    taken.add({"operator: other": 1, "operator: usual": 1})
    seen = []
    thread = threading.Thread(target=lambda: seen.append(taken.drain()))
    thread.start()
    thread.join()
    assert seen == [{}]
    assert taken.drain() == {"operator: other": 2, "operator: usual": 1} and taken.drain() == {}
