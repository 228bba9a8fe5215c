"""Options of the backend: what a user may pass to ``torch.compile(..., backend="fisedit", options={...})``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fisedit_compile.errors import OptionError

NORMS = ("exact", "cached")
LOWERINGS = ("plain", "inductor")
MODES = {
    "default": "plain",
    "reduce-overhead": "plain",
    "max-autotune": "inductor",
    "max-autotune-no-cudagraphs": "inductor",
}
VALID_OPTIONS = ("runtime", "norm", "lowering", "disable_passes")


@dataclass(frozen=True)
class Options:
    """What a compilation depends on.

    Attributes:
        norm: ``"exact"`` updates the recorded statistics of group norms by the changed rows; ``"cached"`` reuses
            the recorded statistics (what FISEdit section 4 and SIGE section 3 do).
        lowering: ``"plain"`` runs the graphs as FX code over ATen; ``"inductor"`` compiles them.
        disabled_passes: names of optional passes to leave out. Their operators stay dense, results stay right.
    """

    norm: str = "exact"
    lowering: str = "plain"
    disabled_passes: frozenset[str] = frozenset()


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Any, Options]:
    """Check the user's ``mode`` and ``options`` and return ``(runtime or None, Options)``.

    Raises:
        OptionError: an option is unknown (the message lists the valid ones) or has an invalid value.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(VALID_OPTIONS))
    if unknown:
        raise OptionError(
            f"unknown option {', '.join(map(repr, unknown))}; valid options are {', '.join(VALID_OPTIONS)}"
        )
    if mode is not None and mode not in MODES:
        raise OptionError(f"unknown mode {mode!r}; valid modes are {', '.join(MODES)}")
    norm = given.get("norm", "exact")
    if norm not in NORMS:
        raise OptionError(f"option norm must be one of {', '.join(NORMS)}, got {norm!r}")
    lowering = given.get("lowering", MODES[mode or "default"])
    if lowering not in LOWERINGS:
        raise OptionError(f"option lowering must be one of {', '.join(LOWERINGS)}, got {lowering!r}")
    disabled = given.get("disable_passes", ())
    if isinstance(disabled, str):
        disabled = tuple(name.strip() for name in disabled.split(",") if name.strip())
    return given.get("runtime"), Options(norm=norm, lowering=lowering, disabled_passes=frozenset(disabled))
