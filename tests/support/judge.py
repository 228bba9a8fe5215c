"""Which positions of an edit are right: those that equal the dense network on the mixed picture, known beforehand.

A position is right if it was computed and everything that it reads is right, or if it was kept and nothing that it
depends on lies inside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.reference import Reference


@dataclass(frozen=True)
class Verdict:
    """Of one value, booleans ``[B, h, w]``.

    Attributes:
        active: whether it was computed.
        right: whether it equals the dense network on the mixed picture.
        owed: whether it must be right: it depends on the mask, and on nothing outside of it.
        idle: computed, although it depends on cells and none of them is in the mask.
        lent: computed, although it depends on nothing: padding that holds the place of its edge.
    """

    active: Tensor
    right: Tensor
    owed: Tensor
    idle: Tensor
    lent: Tensor


def judge(reference: Reference, mask: Tensor) -> dict[str, Verdict]:
    """The verdict of every value with positions, for a mask in the resolution of the finest input."""
    fine = reference.prepared(mask)
    active = reference.active(mask)
    right: dict[tuple[str, int], Tensor] = {}
    verdicts: dict[str, Verdict] = {}
    for name, fields in reference.fields.items():
        for number, field in enumerate(fields):
            wrong = field.wrong([~right[link.source, link.number] for link in field.links])
            computed = active[name][number]
            touched = field.touched(fine)
            if computed is None:
                right[name, number] = ~wrong
                continue
            right[name, number] = torch.where(computed, ~wrong, ~touched)
            if number == 0:
                owed = field.dependent & ~field.touched(~fine)
                idle, lent = computed & field.dependent & ~touched, computed & ~field.dependent
                verdicts[name] = Verdict(computed, right[name, 0], owed, idle, lent)
    return verdicts
