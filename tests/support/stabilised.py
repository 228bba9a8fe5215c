"""What stabilised calls must compute, by definition: the masked reference with the attention of a recorded run.

Attention is recognised by what it reads, not by the rules of the pass: the query has positions, keys have none. Written
out, it is a softmax of scores that have positions, over the tokens of the alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from support.reference import Recording, Reference, aten

ATTENTION = aten.scaled_dot_product_attention.default


def replaced(maps: Tensor, recorded: Tensor, alignment: Tensor) -> Tensor:
    """Maps ``[..., positions, tokens]``, of which the columns of aligned tokens are recorded; column by column."""
    result = maps.clone()
    folds = len(maps) // len(alignment)
    for sample in range(len(maps)):
        for token, before in enumerate(alignment[sample // folds].tolist()):
            if before >= 0:
                result[sample, ..., token] = recorded[sample, ..., before]
    return result


class StabilisedReference(Reference):
    """A dense run of a network that takes its attention to shared words from a recording.

    Args:
        reference: of the network.
        recording: the recorded run, dense or stabilised itself.
        alignment: ``[B, tokens]``.
    """

    def __init__(self, reference: Reference, recording: Recording, alignment: Tensor) -> None:
        self.__dict__.update(reference.__dict__)
        self._recording, self._alignment = recording, alignment

    def _has_positions(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self.places.get(node.name, (None,))[0] is not None

    def _call(
        self,
        node: fx.Node,
        values: dict[str, Any],
        statistics: dict[str, tuple[Tensor, Tensor]],
        recording: Recording | None,
    ) -> Any:
        result = super()._call(node, values, statistics, recording)
        tokens, before = self._alignment.shape[1], self._recording.values
        if node.target is aten.softmax.int and self._has_positions(node) and result.shape[-1] == tokens:
            return replaced(result, before[node.name], self._alignment)
        if node.target is not ATTENTION or not self._has_positions(node.args[0]) or self._has_positions(node.args[1]):
            return result
        query, key, value = (values[operand.name] for operand in node.args[:3])
        if key.shape[-2] != tokens or len(node.args) > 3:
            return result
        names = [operand.name for operand in node.args[:2]]
        recorded = before.get(f"{node.name} maps")
        if recorded is None:
            recorded = self._probabilities(*(before[name] for name in names), node.kwargs.get("scale"))
        maps = replaced(self._probabilities(query, key, node.kwargs.get("scale")), recorded, self._alignment)
        values[f"{node.name} maps"] = maps
        # With the strides of the result, which a later view relies on.
        return result.clone().copy_(maps @ value)

    @staticmethod
    def _probabilities(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return (query @ key.transpose(-1, -2) * scale).softmax(-1)


def stabilised(
    reference: Reference, recording: Recording, inputs: Sequence[Tensor], alignment: Sequence[Sequence[int]]
) -> Recording:
    """The stabilised run of a network on new inputs."""
    return StabilisedReference(reference, recording, torch.tensor(alignment)).record(inputs)
