"""Two values of an argument or a setting in words that tell them apart, also where both look alike when printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

SHOWN = 120
"""Texts of more characters are cut; what differs is shown apart."""


def told_apart(before: Any, now: Any) -> tuple[str, str]:
    """Two values that differ, in words."""
    texts = _short(before), _short(now)
    if texts[0] != texts[1] and all(len(text) <= SHOWN for text in texts):
        return texts
    found = _first_difference(before, now)
    if found is not None:
        where, was, came = found
        return f"{texts[0]} with {was} {where}".rstrip(), f"{texts[1]} with {came} {where}".rstrip()
    if texts[0] != texts[1]:
        return texts
    kinds = [
        f"{text} (a {type(value).__module__}.{type(value).__qualname__})"
        for text, value in zip(texts, (before, now), strict=True)
    ]
    return (kinds[0], kinds[1]) if kinds[0] != kinds[1] else (texts[0], f"another {texts[1]}")


def _short(value: Any) -> str:
    """A value as it may stand in a message."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"a picture of {value.width}x{value.height} pixels"
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    size = f" of {len(value)}" if isinstance(value, (str, list, tuple, Mapping)) else ""
    return f"{text[: SHOWN // 2]}... (a {type(value).__name__}{size})"


def _first_difference(before: Any, now: Any) -> tuple[str, str, str] | None:
    """Where two values differ first, and what is there in each; None: they do not, or it cannot be told."""
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        return _of_arrays(before.detach().cpu(), now.detach().cpu())
    if isinstance(before, np.ndarray) and isinstance(now, np.ndarray):
        return (
            _of_arrays(*(torch.from_numpy(np.array(one)) for one in (before, now))) if _numeric(before, now) else None
        )
    if isinstance(before, Image.Image) and isinstance(now, Image.Image):
        return _of_pictures(before, now)
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        if len(before) != len(now):
            return "", f"{len(before)} elements", f"{len(now)} elements"
        return _of_parts(((f"as element {number}", *pair) for number, pair in enumerate(zip(before, now, strict=True))))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.keys() != now.keys():
            return "", f"the keys {list(before)}", f"the keys {list(now)}"
        return _of_parts((f"under {key!r}", before[key], now[key]) for key in before)
    if isinstance(before, str) and isinstance(now, str) and before != now:
        first = next(
            (i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]),
            min(len(before), len(now)),
        )
        return f"at character {first}", repr(before[first : first + 20]), repr(now[first : first + 20])
    return None


def _of_parts(parts: Any) -> tuple[str, str, str] | None:
    for where, before, now in parts:
        inner = _first_difference(before, now)
        if inner is not None:
            return f"{inner[0]}, {where}" if inner[0] else where, inner[1], inner[2]
        texts = repr(before), repr(now)
        if texts[0] != texts[1] and not isinstance(before, (torch.Tensor, np.ndarray, Image.Image)):
            return where, *texts
    return None


def _numeric(*arrays: np.ndarray) -> bool:
    return all(array.dtype.kind in "biuf" and array.dtype.itemsize <= 8 for array in arrays)


def _of_arrays(before: torch.Tensor, now: torch.Tensor) -> tuple[str, str, str] | None:
    if before.shape != now.shape:
        return "", f"shape {tuple(before.shape)}", f"shape {tuple(now.shape)}"
    if before.dtype != now.dtype:
        return "", f"type {before.dtype}", f"type {now.dtype}"
    positions = (before != now).nonzero()
    if not len(positions):
        return None
    first = positions[0].tolist()
    return f"at {first}", f"{before[tuple(first)].item()}", f"{now[tuple(first)].item()}"


def _of_pictures(before: Image.Image, now: Image.Image) -> tuple[str, str, str] | None:
    if before.mode != now.mode:
        return "", f"mode {before.mode}", f"mode {now.mode}"
    if before.size != now.size:
        return None
    apart = np.asarray(before) != np.asarray(now)
    apart = apart.any(axis=2) if apart.ndim == 3 else apart
    if not apart.any():
        return None
    row, column = (int(place) for place in np.argwhere(apart)[0])
    place = (column, row)
    return f"at row {row} and column {column}", f"{before.getpixel(place)}", f"{now.getpixel(place)}"
