"""Comparing the scalar inputs of an edit (timesteps, sizes) with the recorded ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.errors import ScalarMismatchError
from fisedit_compile.runtime.base import Scalar


def copy_scalar(scalar: Scalar) -> Scalar:
    """A copy that the caller cannot overwrite."""
    if not isinstance(scalar, Tensor):
        return scalar
    with torch.inference_mode(False), torch.no_grad():
        return scalar.detach().clone()


SHOWN = 8
"""A message shows tensors of so many values; of longer ones it gives the shape and the values that tell."""


class ScalarCheck:
    """Compares scalars call by call: on the CPU at once; elsewhere into a number on the device that is read once, when
    the context ends, because reading it at every call would stop the host until the device is done."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._labels: list[str] = []
        self._first: dict[torch.device, Tensor] = {}  # the number of the first comparison that failed

    def compare(self, label: str, recorded: Sequence[Scalar], given: Sequence[Scalar]) -> None:
        """Compare the scalars of one call; ``label`` names the call in messages.

        Raises:
            ScalarMismatchError: their number, shapes, types, devices or (on the CPU) values differ.
        """
        if len(recorded) != len(given):
            raise self._error(label, f"{len(recorded)} scalar inputs", f"{len(given)}")
        for number, (before, now) in enumerate(zip(recorded, given, strict=True)):
            where = f"{label}, scalar input {number}"
            if not isinstance(before, Tensor) or not isinstance(now, Tensor):
                if isinstance(before, Tensor) or isinstance(now, Tensor):
                    raise self._error(where, _with_kind(before), _with_kind(now))
                if before != now and not (before != before and now != now):
                    raise self._error(where, repr(before), repr(now))
                continue
            if (before.shape, before.dtype, before.device) != (now.shape, now.dtype, now.device):
                raise self._error(where, _form(before), _form(now))
            if not self.readable(before):
                self.compare_later(where, before, now)
            elif bool((different := _different(before, now)).any()):
                raise self._error(where, *_told_apart(before, now, different))

    @staticmethod
    def readable(scalar: Tensor) -> bool:
        """Whether reading a value costs nothing."""
        return scalar.device.type == "cpu"

    def compare_later(self, label: str, recorded: Tensor, given: Tensor) -> None:
        """Compare two tensors of one form on their device; ``finish`` reads the result."""
        number = len(self._labels)
        self._labels.append(label)
        with torch.inference_mode(False), torch.no_grad():
            failed = torch.where(_different(recorded, given).any(), number, torch.iinfo(torch.int64).max)
            first = self._first.get(recorded.device)
            self._first[recorded.device] = failed if first is None else torch.minimum(first, failed)

    def finish(self) -> None:
        """Read the results of ``compare_later``.

        Raises:
            ScalarMismatchError: names the first comparison that failed.
        """
        for first in self._first.values():
            number = int(first)
            if number < len(self._labels):
                raise self._error(self._labels[number], "the recorded value", "another")

    def _error(self, label: str, expected: str, got: str) -> ScalarMismatchError:
        return ScalarMismatchError(
            f"{label}: expected {expected} as in base {self._base!r}, got {got}",
            advice="edit with the scheduler, the number of steps and the sizes the base was recorded with, or record "
            "again",
        )


def _different(recorded: Tensor, given: Tensor) -> Tensor:
    """Where two tensors of one form differ; NaN is what it was."""
    different = recorded != given
    if recorded.is_floating_point() or recorded.is_complex():
        different &= ~(recorded.isnan() & given.isnan())
    return different


def _with_kind(scalar: Scalar) -> str:
    """A scalar and what it is: a number and a tensor that holds it look alike."""
    return (
        f"{_describe(scalar)} ({f'a tensor of {_form(scalar)}' if isinstance(scalar, Tensor) else 'a Python number'})"
    )


def _told_apart(recorded: Tensor, given: Tensor, different: Tensor) -> tuple[str, str]:
    """Both in words; of long ones also the first value that differs, where those that are shown do not."""
    expected, got = _describe(recorded), _describe(given)
    if recorded.numel() > SHOWN and not bool(different.flatten()[:SHOWN].any()):
        position = different.nonzero()[0].tolist()
        before, now = (scalar[tuple(position)].item() for scalar in (recorded, given))
        expected, got = f"{expected} and has {before} at position {position}", f"{got} and has {now} there"
    return expected, got


def _describe(scalar: Scalar) -> str:
    if not isinstance(scalar, Tensor):
        return repr(scalar)
    if scalar.numel() <= SHOWN:
        return str(scalar.tolist())
    return f"{_form(scalar)} that begins with {scalar.flatten()[:SHOWN].tolist()}"


def _form(scalar: Tensor) -> str:
    return f"shape {list(scalar.shape)} {str(scalar.dtype).removeprefix('torch.')} on {scalar.device}"
