"""The sparse operators, ``torch.ops.fisedit.*``; importing this package registers them and all implementations.

A folder with a ``spec.py`` holds operators. Its files of one word are imported, and what their tuples
``IMPLEMENTATIONS`` and ``MODELS`` name is registered: a new implementation is a new file, and without its file an
implementation is gone. Files of two words (``triton_kernels.py``) are parts of others.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from fisedit_compile.operators import choosing
from fisedit_compile.operators.library import LIBRARY, OPERATORS


def _modules() -> Iterator[ModuleType]:
    for folder in pkgutil.iter_modules(__path__, f"{__name__}."):
        if not folder.ispkg:
            continue
        package = importlib.import_module(folder.name)
        names = [module.name for module in pkgutil.iter_modules(package.__path__)]
        if "spec" in names:
            yield from (importlib.import_module(f"{folder.name}.{name}") for name in names if "_" not in name)


def _register() -> None:
    """Register what all files implement, and tell the dispatcher who computes the operators."""
    for module in _modules():
        for implementation in getattr(module, "IMPLEMENTATIONS", ()):
            implementation.operator.add(implementation)
        for model in getattr(module, "MODELS", ()):
            model.operator.models.append(model)
            model.operator.models.sort(key=lambda known: -known.rank)
    for overload, operator in OPERATORS.items():
        if overload.namespace == LIBRARY.ns:
            LIBRARY.impl(operator.name, choosing.function(operator), "CompositeExplicitAutograd")


_register()

_FUNCTIONS = {operator.name: choosing.function(operator) for operator in OPERATORS.values()}

as_strided = _FUNCTIONS["as_strided"]
attend = _FUNCTIONS["attend"]
attention_rows = _FUNCTIONS["attention_rows"]
complex_of_pairs = _FUNCTIONS["complex_of_pairs"]
contiguous_rows = _FUNCTIONS["contiguous_rows"]
conv_choice = _FUNCTIONS["conv_choice"]
conv_dense = _FUNCTIONS["conv_dense"]
conv_map = _FUNCTIONS["conv_map"]
conv_map_tiles = _FUNCTIONS["conv_map_tiles"]
conv_rows = _FUNCTIONS["conv_rows"]
conv_tiles = _FUNCTIONS["conv_tiles"]
convolve = _FUNCTIONS["convolve"]
gather_rows = _FUNCTIONS["gather_rows"]
gather_taps = _FUNCTIONS["gather_taps"]
linear_map = _FUNCTIONS["linear_map"]
linear_rows = _FUNCTIONS["linear_rows"]
norm_apply = _FUNCTIONS["norm_apply"]
norm_partials = _FUNCTIONS["norm_partials"]
norm_record = _FUNCTIONS["norm_record"]
norm_totals = _FUNCTIONS["norm_totals"]
pack_conv_weight = _FUNCTIONS["pack_conv_weight"]
pack_matrix = _FUNCTIONS["pack_matrix"]
pack_tile_weights = _FUNCTIONS["pack_tile_weights"]
pixel_select = _FUNCTIONS["pixel_select"]
reinterpreted = _FUNCTIONS["reinterpreted"]
scatter_rows = _FUNCTIONS["scatter_rows"]
