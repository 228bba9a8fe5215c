"""Which inputs are pictures that come as tokens, by what the user says.

Why: transformers over patches that are cut outside the network (Flux) take ``[B, H * W, C]``. No shape tells H from W,
and a mask could not be laid over them: the option ``tokens`` names these inputs and their resolutions.

Before: ``InputInfo("user", "hidden_states")`` of shape [2, 140, 64], and the option ``{"hidden_states": (14, 10)}``
After:  ``InputInfo("user", "hidden_states", tokens=Domain(14, 10))``

Conditions:
1. The input is a floating tensor ``[B, tokens, C]`` that the caller passes, no parameter.
2. One of its resolutions has as many positions as the input has tokens.
Where one of them does not hold, what the user says is wrong, and so would be the masks: an error.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fisedit_compile.errors import OptionError
from fisedit_compile.options import Resolutions
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.runtime.spec import Domain


def declare_tokens(compilation: Compilation) -> None:
    """Run the pass: ``compilation.inputs`` get the resolutions of those that option ``tokens`` names.

    A name that no input has is left out of account: of a network in several graphs, each has some of the inputs.

    Raises:
        OptionError: condition 1 or 2 does not hold.
    """
    named = dict(compilation.options.tokens)
    placeholders = (node for node in compilation.edit.graph.nodes if node.op == "placeholder")
    declared = []
    for node, info in zip(placeholders, compilation.inputs, strict=True):
        if info.name in named and info.kind != "parameter":
            info = replace(info, tokens=_resolution(info.name, node.meta.get(VALUE), named[info.name]))
        declared.append(info)
    compilation.inputs = tuple(declared)


def _resolution(name: str, value: object, resolutions: Resolutions) -> Domain:
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        came = f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise OptionError(f"option tokens names {name}, which must be a floating tensor [B, tokens, C]; it is {came}")
    count = int(value.shape[1])
    known = {height * width: Domain(height, width) for height, width in resolutions}
    if count not in known:
        listed = ", ".join(f"{domain} ({size} tokens)" for size, domain in known.items())
        raise OptionError(
            f"{name} came with {count} tokens, but option tokens gives it {listed}; list the (H, W) of every "
            "resolution that is used"
        )
    return known[count]
