"""The arguments of a network call, part by part: which differ between two calls, and in which samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.pipelines.arguments import same_value

Place = tuple[str | int, ...]
"""Where a part of the arguments is: the name of the argument, then keys and numbers inside of it."""


def parts_of(arguments: Mapping[str, Any]) -> dict[Place, Any]:
    """What arguments consist of: tensors and other values in dictionaries, lists and tuples, by place."""
    return dict(_walk((), arguments))


def _walk(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk((*place, key), inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _walk((*place, number), inner)
    else:
        yield place, value


def rebuilt(arguments: Mapping[str, Any], part: Callable[[Place, Any], Any]) -> dict[str, Any]:
    """Arguments with every part exchanged by ``part``, which is given its place and its value."""
    return {name: _rebuild((name,), value, part) for name, value in arguments.items()}


def _rebuild(place: Place, value: Any, part: Callable[[Place, Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _rebuild((*place, key), inner, part) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_rebuild((*place, number), inner, part) for number, inner in enumerate(value)]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return part(place, value)


def same_part(left: Any, right: Any) -> bool:
    """Whether two parts are the same; of tensors every bit."""
    if left is right:
        return True
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return same_value(left, right)
    alike = left.shape == right.shape and left.dtype == right.dtype and left.device == right.device
    return alike and bool(torch.equal(_bits(left.reshape(1, -1)), _bits(right.reshape(1, -1))))


def differing_samples(left: Any, right: Any, batch: int) -> list[bool]:
    """In which samples of a batch two parts differ, bit by bit; where they are not of samples, in all or in none."""
    if same_part(left, right):
        return [False] * batch
    if not _of_samples(left, batch) or not _of_samples(right, batch) or left.shape != right.shape:
        return [True] * batch
    if left.dtype != right.dtype or left.device != right.device:
        return [True] * batch
    apart = _bits(left.reshape(batch, -1)) != _bits(right.reshape(batch, -1))
    found: list[bool] = apart.any(dim=1).tolist()
    return found


def _of_samples(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch and value.numel() > 0


def _bits(rows: Tensor) -> Tensor:
    """Rows as bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return rows.detach().contiguous().view(torch.uint8)


def can_be_split(arguments: Mapping[str, Any], batch: int) -> bool:
    """Whether some samples of a call can be computed without the others: all that there is for each of them is in
    tensors."""

    def whole(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(map(whole, value.values()))
        if isinstance(value, (list, tuple)):
            # One value for each sample, such as the sizes of pictures.
            listed = len(value) == batch and not any(isinstance(one, Tensor) for one in value)
            return not listed and all(map(whole, value))
        return True

    return whole(arguments)


def of_samples(arguments: Mapping[str, Any], samples: list[int], batch: int) -> dict[str, Any]:
    """Arguments of a call of some samples of a batch."""

    def chosen(_: Place, value: Any) -> Any:
        if not _of_samples(value, batch):
            return value
        return value.index_select(0, torch.tensor(samples, device=value.device))

    return rebuilt(arguments, chosen)
