"""Encoders of texts and of pictures given as prompts: what they made of the same input before is used again.

Most edits change one of several texts (the prompt, and not the negative one), and finding a mask calls the pipeline
once more. So a session remembers the last results of each encoder, and compares inputs, weights and settings bit by
bit.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fisedit_compile.errors import WeightsChangedError
from fisedit_compile.pipelines.arguments import keep_value
from fisedit_compile.pipelines.compiling import PLAIN, Structure
from fisedit_compile.pipelines.probing.parts import parts_of, same_part
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.twin import module_view
from fisedit_compile.private.accelerate import is_offloaded
from fisedit_compile.private.modules import compiled_call, has_foreign_hooks, original_module
from fisedit_compile.runtime.fingerprint import Weights

PREFIXES = ("text_encoder", "image_encoder")
"""How the attributes of pipelines begin that hold such encoders."""
REMEMBERED = 8
"""Results of each encoder that are kept, the last ones."""


@dataclass
class _Results:
    """What one encoder made of its last inputs.

    Attributes:
        weights: that it had.
        structure: of its modules.
        known: inputs, and what was made of them.
    """

    weights: Weights
    structure: Structure
    known: deque[tuple[dict[Any, Any], Any]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


class EncoderMemory:
    """The last results of the encoders of a session's pipeline."""

    def __init__(self) -> None:
        self._results: WeakKeyDictionary[nn.Module, _Results] = WeakKeyDictionary()

    def views(self, pipe: Any, numbers: RandomNumbers) -> dict[str, Any]:
        """What stands for the encoders of a pipeline in one call of it, by attribute; they have the same tensors.

        Args:
            pipe: the user's pipeline.
            numbers: drawn at random in the call; what they have a part in is not remembered.
        """
        found = {name: part for name, part in vars(pipe).items() if name.startswith(PREFIXES)}
        return {name: self._view(part, numbers) for name, part in found.items() if _can_be_watched(part)}

    def _view(self, encoder: nn.Module, numbers: RandomNumbers) -> Any:
        view = module_view(encoder)
        checked = False

        @wraps(encoder.forward)
        def forward(*positional: Any, **named: Any) -> Any:
            nonlocal checked
            given = _described(encoder, positional, named)
            if given is None:
                return encoder.forward(*positional, **named)
            results = self._current(encoder, checked)
            checked = True
            for known, result in results.known:
                if known.keys() == given.keys() and all(same_part(known[place], given[place]) for place in known):
                    return copy.deepcopy(result)
            drawn, inputs = numbers.drawn, keep_value(given)
            result = encoder.forward(*positional, **named)
            if numbers.drawn == drawn and _is_plain(result):
                results.known.append((inputs, copy.deepcopy(result)))
            return result

        vars(view)["forward"] = forward
        return view

    def _current(self, encoder: nn.Module, checked: bool) -> _Results:
        """The results of an encoder as it is now.

        Args:
            encoder: of the pipeline.
            checked: whether its weights were compared in this call of the pipeline.
        """
        results, structure = self._results.get(encoder), Structure(encoder)
        tensors = [*encoder.parameters(), *encoder.buffers()]
        if results is not None and results.structure.same(structure) and (checked or _same(results.weights, tensors)):
            return results
        results = self._results[encoder] = _Results(Weights(tensors), structure)
        return results


def _can_be_watched(part: Any) -> bool:
    """Whether a part is a network whose calls come to its own code, and to no hooks of others: what these do may depend
    on anything."""
    if not isinstance(part, nn.Module) or part is not original_module(part) or compiled_call(part) is not None:
        return False
    own = "forward" not in vars(part) and not is_offloaded(part)
    return own and not any(map(has_foreign_hooks, part.modules()))


def _described(encoder: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> dict[Any, Any] | None:
    """What decides the result of a call; None: not all of it is known."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or any(part.training for part in encoder.modules()):
        return None
    parts: dict[Any, Any] = parts_of({"positional": positional, "named": named})
    if not all(isinstance(value, (Tensor, *PLAIN)) for value in parts.values()):
        return None
    kinds = {value.device.type for value in (*parts.values(), *encoder.parameters()) if isinstance(value, Tensor)}
    for kind in sorted(kinds):
        parts["autocast", kind] = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return parts


def _is_plain(result: Any) -> bool:
    """Whether a copy of a result is all of it: tensors and values."""
    parts = parts_of({"result": result})
    return all(isinstance(value, (Tensor, *PLAIN)) for value in parts.values())


def _same(weights: Weights, tensors: list[Tensor]) -> bool:
    try:
        weights.verify(tensors, "of the encoder")
    except WeightsChangedError:
        return False
    return True
