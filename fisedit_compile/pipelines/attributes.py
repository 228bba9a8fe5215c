"""Exchanging attributes of objects of the user's for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute for a while, and then take it away or put the former one back."""
    present = name in vars(owner)
    former = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if present:
            setattr(owner, name, former)
        else:
            delattr(owner, name)
