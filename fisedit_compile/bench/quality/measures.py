"""What is measured of an edited picture: whether it shows what was asked for, and what it kept.

"Asked for" is where the checker finds the edited attribute, in the base and in the dense edit
(``fisedit_compile/scenes/regions.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fisedit_compile.bench.quality.cases import EditCase
from fisedit_compile.errors import MissingPackageError
from fisedit_compile.scenes import check_edit

RANGE = 255.0
"""Of the values of a picture."""


@dataclass(frozen=True)
class Outcome:
    """What a method made of an edit.

    Attributes:
        picture: after the edit.
        mask: bool ``[side, side]``, where the method may have changed something; None: it has no mask.
        dense_steps: what it computed densely, in steps of the plain pipeline: calls of the network with both halves of
            the guidance. Half a batch counts half, a part of the picture as its share.
        seconds: from the words to the picture. What the base cost is not in it.
    """

    picture: Image.Image
    mask: NDArray[np.bool_] | None
    dense_steps: float
    seconds: float


@dataclass(frozen=True)
class Measures:
    """The numbers of an edited picture.

    Attributes:
        wrong: the attributes that are not as they should be: not what was asked for, or not kept.
        psnr: peak signal-to-noise ratio to the dense edit in the asked-for region, in decibels; infinite for equal
            pixels. None where nothing was asked for.
        ssim: structural similarity to the dense edit, averaged over that region; None likewise.
        background: peak signal-to-noise ratio to the base outside of the asked-for region; None where all is asked for.
        outside: the same outside of the method's own mask; None without a mask, or where it covers everything.
        recall: share of the asked-for region that the mask covers; None without either.
        area: area of the mask over that of the region; None without either.
        share: share of the picture that the mask covers; None without a mask.
        identical: whether the picture is the base, pixel by pixel.
        dense_steps: see :class:`Outcome`.
        seconds: see :class:`Outcome`.
    """

    wrong: tuple[str, ...]
    psnr: float | None
    ssim: float | None
    background: float | None
    outside: float | None
    recall: float | None
    area: float | None
    share: float | None
    identical: bool
    dense_steps: float
    seconds: float

    @property
    def success(self) -> bool:
        """Whether the picture shows what was asked for and kept all other attributes."""
        return not self.wrong

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values that JSON can hold; an infinite one is the text ``inf``."""
        values = asdict(self) | {"wrong": list(self.wrong)}
        return {name: "inf" if value == math.inf else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measures:
        """The numbers that :meth:`to_dict` gave.

        Raises:
            KeyError: one is missing.
        """
        found = {field.name: values[field.name] for field in fields(cls)}
        found = {name: math.inf if value == "inf" else value for name, value in found.items()}
        return cls(**{**found, "wrong": tuple(found["wrong"])})


def measure(
    case: EditCase, base: Image.Image, dense: Image.Image, region: NDArray[np.bool_], outcome: Outcome
) -> Measures:
    """Measure what a method made of an edit.

    Args:
        case: the edit.
        base: the picture before it.
        dense: what the plain pipeline makes of the new prompt and the same noise.
        region: bool ``[side, side]``, what was asked for.
        outcome: of the method.
    """
    picture, mask = outcome.picture, outcome.mask
    right = check_edit(base, picture, case.after, case.kind)
    asked, covered = np.count_nonzero(region), 0 if mask is None else np.count_nonzero(mask)
    both = None if mask is None or not asked else np.count_nonzero(mask & region) / asked
    return Measures(
        wrong=tuple(name for name, kept in right.items() if not kept),
        psnr=peak_ratio(picture, dense, region),
        ssim=similarity(picture, dense, region),
        background=peak_ratio(picture, base, ~region),
        outside=None if mask is None else peak_ratio(picture, base, ~mask),
        recall=both,
        area=None if mask is None or not asked else covered / asked,
        share=None if mask is None else covered / mask.size,
        identical=bool(np.array_equal(np.asarray(picture), np.asarray(base))),
        dense_steps=outcome.dense_steps,
        seconds=outcome.seconds,
    )


def peak_ratio(left: Image.Image, right: Image.Image, where: NDArray[np.bool_]) -> float | None:
    """Peak signal-to-noise ratio of two pictures in some pixels, in decibels; None where there is none of them."""
    if not where.any():
        return None
    inside = torch.from_numpy(where)
    ratio, _ = require_torchmetrics()
    return float(ratio(_values(left)[..., inside], _values(right)[..., inside], data_range=RANGE))


def similarity(left: Image.Image, right: Image.Image, where: NDArray[np.bool_]) -> float | None:
    """Structural similarity of two pictures, averaged over some pixels; None where there is none of them.

    The windows around these pixels reach beyond them.
    """
    if not where.any():
        return None
    _, structural = require_torchmetrics()
    _, whole = structural(_values(left), _values(right), data_range=RANGE, return_full_image=True)
    return float(whole[..., torch.from_numpy(where)].mean())


def require_torchmetrics() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The peak signal-to-noise ratio and the structural similarity of torchmetrics.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise MissingPackageError("torchmetrics", "measuring edits", extra="eval") from error
    return peak_signal_noise_ratio, structural_similarity_index_measure


def _values(picture: Image.Image) -> Tensor:
    """Values of a picture from 0 to 255, float64 ``[1, 3, height, width]``."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].double()
