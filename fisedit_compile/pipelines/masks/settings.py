"""How the mask of an edit is found: the settings, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from fisedit_compile.errors import OptionError

Method = Literal["probe", "fisedit"]

DENSE_STEPS, DENSE_OUT_OF = 10, 50
"""How many of how many scheduler steps run densely with FISEdit's method, unless it is said."""
DENSE_GROWTH = 1
"""Latent cells by which a mask grows that was found with FISEdit's method, unless it is said."""
PROBE_GROWTH_PIXELS = 8
"""Pixels by which a mask grows that was found by probes, unless it is said."""
GLOBAL_SHARE = 0.55
"""From which share of the picture on a change is one of the whole picture, unless it is said."""


@dataclass(frozen=True)
class AutomaticMask:
    """How the mask of an edit is found.

    Attributes:
        method: ``"probe"``: the network is called once to three times with the new prompt on what the recorded run gave
            it, and all steps are sparse. ``"fisedit"``: the first steps run densely (arXiv 2305.17423).
        steps: with ``"fisedit"``, how many of ``out_of`` scheduler steps run densely, scaled to the steps of the run;
            None: 10.
        out_of: number of steps that ``steps`` refers to; None: 50.
        threshold: between 0 and 1, of the difference brought to 0..1; None chooses it by Otsu's method.
        hysteresis: cells above this share of the threshold count as well, where they are connected with cells above
            the threshold; 1 leaves it out.
        opening: side, in latent cells, of the square of the morphological opening, which removes specks; 0 or 1 leaves
            it out.
        fill_holes: whether holes of the mask are filled; None: with ``"probe"``.
        growth: by how many latent cells, in every direction, the mask is grown in the end. What differs in the first
            steps is smaller than what differs in the end; docs/pipelines.md has what growth brings and costs.
        growth_pixels: the same in pixels of the picture, in place of ``growth``: all cells that have a pixel so near
            belong to the mask. None for both: 8 pixels with ``"probe"``, one cell with ``"fisedit"``.
        global_share: with ``"probe"``, a mask of a greater share of the picture becomes everything, and the edit runs
            densely: what changes so much is the whole picture, such as the time of day. 1 leaves it out; None: 0.55.
        stabilised: with ``"fisedit"``, the dense steps take the attention to words that both prompts share from the
            recorded run, which has to have kept it: the session must have been told so, by its own ``automatic_mask``,
            when it generated.

    Raises:
        OptionError: a value is out of its range, or belongs to the other method.
    """

    method: Method = "probe"
    steps: int | None = None
    out_of: int | None = None
    threshold: float | None = None
    hysteresis: float = 1.0
    opening: int = 2
    fill_holes: bool | None = None
    growth: int | None = None
    growth_pixels: int | None = None
    global_share: float | None = None
    stabilised: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        self._check_types()
        if self.method not in get_args(Method):
            raise OptionError(f"automatic mask: method must be 'probe' or 'fisedit', got {self.method!r}")
        if self.method == "probe" and (self.steps is not None or self.out_of is not None):
            raise OptionError(
                "automatic mask: steps and out_of say how many steps run densely, and the method 'probe' runs none so; "
                "leave them out, or give method='fisedit'"
            )
        if self.method == "probe" and self.stabilised:
            raise OptionError(
                "automatic mask: stabilised is for the dense steps of the method 'fisedit', and 'probe' has none; "
                "leave it out, or give method='fisedit'"
            )
        if self.method == "fisedit" and self.global_share is not None:
            raise OptionError("automatic mask: global_share is for the method 'probe'; leave it out")
        steps, out_of = self._steps
        if out_of < 1 or not 1 <= steps <= out_of:
            raise OptionError(f"automatic mask: steps must be from 1 to out_of, got {steps} of {out_of}")
        if self.threshold is not None and not 0.0 <= self.threshold < 1.0:
            raise OptionError(f"automatic mask: threshold must be from 0 to below 1, got {self.threshold}")
        for name, share in (("hysteresis", self.hysteresis), ("global_share", self.global_share)):
            if share is not None and not 0.0 < share <= 1.0:
                raise OptionError(f"automatic mask: {name} must be above 0 and up to 1, got {share}")
        if self.growth is not None and self.growth_pixels is not None:
            raise OptionError(
                f"automatic mask: give growth, in latent cells, or growth_pixels, got both ({self.growth} and "
                f"{self.growth_pixels})"
            )
        if self.opening < 0 or (self.growth or 0) < 0 or (self.growth_pixels or 0) < 0:
            growth = self.growth if self.growth_pixels is None else self.growth_pixels
            raise OptionError(
                f"automatic mask: opening and growth must not be negative, got {self.opening} and {growth}"
            )

    def _check_types(self) -> None:
        for name in ("steps", "out_of", "opening", "growth", "growth_pixels"):
            value, optional = getattr(self, name), name != "opening"
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise OptionError(f"automatic mask: {name} must be a whole number, got {value!r}")
        for name in ("threshold", "hysteresis", "global_share"):
            value, optional = getattr(self, name), name != "hysteresis"
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, Real)):
                raise OptionError(f"automatic mask: {name} must be a number, got {value!r}")

    @property
    def _steps(self) -> tuple[int, int]:
        steps = DENSE_STEPS if self.steps is None else self.steps
        return steps, DENSE_OUT_OF if self.out_of is None else self.out_of

    def scaled_steps(self, steps: int) -> int:
        """How many of ``steps`` scheduler steps run densely with FISEdit's method: at least one."""
        dense, out_of = self._steps
        return max(1, math.ceil(steps * dense / out_of))

    @property
    def fills_holes(self) -> bool:
        """Whether holes are filled."""
        return self.method == "probe" if self.fill_holes is None else self.fill_holes

    @property
    def grown_pixels(self) -> int | None:
        """Pixels of growth; None: ``grown_cells`` counts."""
        if self.growth is None and self.growth_pixels is None and self.method == "probe":
            return PROBE_GROWTH_PIXELS
        return self.growth_pixels

    @property
    def grown_cells(self) -> int:
        """Latent cells of growth, where there is none in pixels."""
        return DENSE_GROWTH if self.growth is None else self.growth

    @property
    def most_local(self) -> float:
        """The greatest share of the picture that a mask covers; one of more becomes everything."""
        return GLOBAL_SHARE if self.global_share is None else self.global_share
