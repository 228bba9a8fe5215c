"""Options of the backend: what a user may pass to ``torch.compile(..., backend="fisedit", options={...})``.

docs/options.md lists all options, also those of sessions, of the command line and of the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from fisedit_compile.errors import OptionError

NORMS = ("exact", "cached")
LOWERINGS = ("plain", "inductor")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
#: Those that ask for inductor's code on a GPU. On a processor the plain lowering is the faster one: measured ways to
#: convolve, packed weights and compiled products are its own.
INDUCTOR_MODES = ("max-autotune", "max-autotune-no-cudagraphs")
CONVOLUTIONS = ("auto", "rows", "tiles", "dense")
VALID_OPTIONS = (
    "runtime",
    "norm",
    "lowering",
    "packing",
    "convolution",
    "cuda_graphs",
    "tokens",
    "content",
    "disable_passes",
)
TOKENS_HINT = "; option tokens makes one"
NUMBERS_HINT = "; PyTorch compiled it for any value of the Python numbers"
"""How the advice on options begins that ends the reason why a graph runs densely."""

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
Resolutions = tuple[tuple[int, int], ...]


def without_hints(reason: str) -> str:
    """Why a graph runs densely, without advice on options: the user of an edit session cannot give any."""
    for hint in (TOKENS_HINT, NUMBERS_HINT):
        reason = reason.partition(hint)[0]
    return reason


def cache_folder() -> Path:
    """Where measured times and generated code are kept: ``$FISEDIT_CACHE_DIR``, or the user's cache folder."""
    given = os.environ.get("FISEDIT_CACHE_DIR")
    return Path(given) if given else user_cache_path("fisedit-compile")


@lru_cache(maxsize=1)
def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less in a container; None where nobody tells."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        found.append(int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    except (AttributeError, OSError, ValueError):
        pass  # Another system, no container, or one without a limit ("max").
    return min((size for size in found if size > 0), default=None)


def packing_limit() -> int | None:
    """Most bytes of packed weights unless the user says otherwise: a quarter of the memory; None: no limit.

    The same for all graphs of a process, since the versions of one graph share their packed weights.
    """
    memory = machine_memory()
    return None if memory is None else memory // 4


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate(("", "K", "M", "G", "T")) if unit}


def parse_bytes(name: str, given: int | str | None) -> int | None:
    """Bytes from a number or a text such as ``"8GB"`` (10^9) or ``"512 MiB"`` (2^20); None is no limit.

    Args:
        name: of the setting, for the message.
        given: what the user gave.

    Raises:
        OptionError: it is neither, or not positive.
    """
    if given is None:
        return None
    count: float = -1
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", given, re.IGNORECASE)
        if match and match[2].upper() in _UNITS:
            count = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(given, int) and not isinstance(given, bool):
        count = given
    if count <= 0:
        raise OptionError(
            f"{name} must be a positive number of bytes or a text such as '8GB' or '512MiB', got {given!r}"
        )
    return int(count)


@dataclass(frozen=True)
class Options:
    """What a compilation depends on.

    Attributes:
        norm: ``"exact"`` updates the recorded statistics of group norms by the changed rows; ``"cached"`` reuses
            the recorded statistics (what FISEdit section 4 and SIGE section 3 do).
        lowering: ``"plain"`` runs the graphs as FX code over ATen; ``"inductor"`` compiles them.
        packing: most bytes that weights packed for the processor may take; None: no limit, 0: none are packed.
        pack_all: pack weights whether or not products with packed weights were measured to be faster.
        convolution: how 3x3 convolutions are computed: ``"auto"`` in the way that was measured (on a processor) or is
            estimated (on a GPU) to be the fastest, or always by ``"rows"``, by ``"tiles"`` (on a processor) or
            ``"dense"`` where that is possible.
        cuda_graphs: on CUDA, capture the launches of sparse calls and replay them for later calls of the same form.
        disabled_passes: names of optional passes to leave out. Their operators stay dense, results stay right.
        tokens: names of inputs ``[B, H * W, C]`` that are pictures row by row, and the resolutions (H, W) of each.
        content: names of inputs of rank 0 or 1 that an edit may change, as it may change the prompt.
    """

    norm: str = "exact"
    lowering: str = "plain"
    packing: int | None = None
    pack_all: bool = False
    convolution: str = "auto"
    cuda_graphs: bool = True
    disabled_passes: frozenset[str] = frozenset()
    tokens: tuple[tuple[str, Resolutions], ...] = ()
    content: tuple[str, ...] = ()


def _parse_tokens(given: Any) -> tuple[tuple[str, Resolutions], ...]:
    """Option tokens: ``{"hidden_states": (64, 64)}``, or a list of resolutions for each name."""
    expected = (
        "option tokens must map names of inputs [B, H * W, C] to (H, W) or a list of such pairs with different H * W"
    )
    if not isinstance(given, Mapping):
        raise OptionError(f"{expected}, got {given!r}")
    parsed = []
    for name, resolutions in given.items():
        pairs = [resolutions] if isinstance(resolutions, tuple) else resolutions
        if not isinstance(name, str) or not isinstance(pairs, list) or not pairs:
            raise OptionError(f"{expected}, got {name!r}: {resolutions!r}")
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
                raise OptionError(f"{expected}, got {pair!r} for {name!r}")
        if len({height * width for height, width in pairs}) < len(pairs):
            raise OptionError(f"{expected}; of {pairs} for {name!r}, several have as many tokens")
        parsed.append((name, tuple(pairs)))
    return tuple(sorted(parsed))


def _parse_content(given: Any) -> tuple[str, ...]:
    """Option content: ``["guidance"]``."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise OptionError(f"option content must be a list of names of inputs, got {given!r}")
    return tuple(sorted(given))


def parse_options(
    mode: str | None, options: Mapping[str, Any] | None, devices: Collection[str] = ()
) -> tuple[Any, Options]:
    """Check the user's ``mode`` and ``options`` and return ``(runtime or None, Options)``.

    Args:
        mode: one of ``MODES`` or None. Options go before it.
        options: see ``VALID_OPTIONS``.
        devices: types of the devices that the graph's tensors are on, as far as known.

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
    on_gpu = any(device not in ("cpu", "meta") for device in devices)
    lowering = given.get("lowering", "inductor" if on_gpu and mode in INDUCTOR_MODES else "plain")
    if lowering not in LOWERINGS:
        raise OptionError(f"option lowering must be one of {', '.join(LOWERINGS)}, got {lowering!r}")
    packing = given.get("packing", "auto")
    if isinstance(packing, bool):
        limit = None if packing else 0
    else:
        limit = packing_limit() if packing == "auto" else parse_bytes("option packing", packing)
    convolution = given.get("convolution", "auto")
    if convolution not in CONVOLUTIONS:
        raise OptionError(f"option convolution must be one of {', '.join(CONVOLUTIONS)}, got {convolution!r}")
    cuda_graphs = given.get("cuda_graphs", mode != "max-autotune-no-cudagraphs")
    if not isinstance(cuda_graphs, bool):
        raise OptionError(f"option cuda_graphs must be True or False, got {cuda_graphs!r}")
    disabled = given.get("disable_passes", ())
    if isinstance(disabled, str):
        disabled = tuple(name.strip() for name in disabled.split(",") if name.strip())
    return given.get("runtime"), Options(
        norm,
        lowering,
        limit,
        packing is True,
        convolution,
        cuda_graphs,
        frozenset(disabled),
        _parse_tokens(given.get("tokens", {})),
        _parse_content(given.get("content", ())),
    )
