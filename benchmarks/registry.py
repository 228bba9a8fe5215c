"""Cases that are worth repeating, and the speed-ups that each must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fisedit_compile.bench.unet import Settings


@dataclass(frozen=True)
class Case:
    """A benchmark and its gate.

    Attributes:
        settings: what to measure.
        least: by density, the speed-up over the best dense variant below which the run fails. About half of what was
            measured: it catches a graph that silently went dense, on any machine. Without one, nothing was measured.
    """

    settings: Settings
    least: Mapping[float, float] = field(default_factory=dict)


DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

CASES: dict[str, Case] = {
    "scenes-128-square": Case(Settings(model="scenes", size=128, densities=(0.05, 0.2), repeats=3)),
    "sd15-512-square": Case(
        Settings(model="sd15", size=512, densities=DENSITIES, inductor=True), {0.02: 7.0, 0.05: 4.8, 0.1: 3.2, 0.2: 2.0}
    ),
    "sd15-512-ragged": Case(Settings(model="sd15", size=512, densities=DENSITIES, shape="ragged")),
    "sd15-512-disc": Case(Settings(model="sd15", size=512, densities=DENSITIES, shape="disc")),
    "sd15-512-square-bf16": Case(Settings(model="sd15", size=512, densities=DENSITIES, dtype="bf16")),
    "sd15-512-square-cached": Case(Settings(model="sd15", size=512, densities=DENSITIES, norm="cached")),
    "sdxl-1024-square": Case(Settings(model="sdxl", size=1024, densities=DENSITIES, calls=2, repeats=3)),
}
