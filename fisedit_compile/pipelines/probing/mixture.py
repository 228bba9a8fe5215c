"""How a pipeline mixes the predictions of its network calls to the guided one, learnt from what it makes of them.

Guidance is a weighted sum, ``u + s (c - u)``, of predictions that lie in one batch or in several calls, in an order and
with weights that each pipeline has its own. The session sees both ends: what the network returned, and what the
scheduler was given. The weights follow by least squares, for each picture alone, so that a rescaled guidance is such a
sum as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError

COLLINEAR = 1e-9
"""Predictions whose squares and products agree so well are one, such as those of two empty prompts."""
WORST_FIT = 0.1
"""The greatest share of the guided prediction that a weighted sum may miss; beyond it all predictions weigh alike."""


def predictions_of(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """The predictions of a turn for each picture, ``[K, B, values]`` in double precision.

    Args:
        outputs: of the calls, in order, ``[k * B, ...]``; more channels than the guided prediction has, as of networks
            that predict a variance, are left out.
        like: the guided prediction ``[B, ...]``.

    Raises:
        PipelineError: their forms do not fit.
    """
    found = []
    for output in outputs:
        pictures = like.shape[0]
        fits = output.dim() == like.dim() and output.shape[0] % pictures == 0
        if not fits or any(has < wanted for has, wanted in zip(output.shape[1:], like.shape[1:], strict=True)):
            raise PipelineError(
                f"the network predicts {tuple(output.shape)} and the scheduler is given {tuple(like.shape)}, so a mask "
                "cannot be found by probes; give a mask, or AutomaticMask(method='fisedit')"
            )
        for axis, size in enumerate(like.shape[1:], start=1):
            output = output.narrow(axis, 0, size)
        found += [part.flatten(1).double() for part in output.chunk(output.shape[0] // pictures)]
    return torch.stack(found)


def weights_of(predictions: Tensor, guided: Tensor) -> Tensor:
    """The weights ``[K, B]`` with which the predictions ``[K, B, values]`` add up to the guided one ``[B, ...]``."""
    wanted = guided.flatten(1).double()
    stacked = predictions.permute(1, 0, 2)
    products = (stacked @ stacked.transpose(1, 2)).cpu()
    projected = (stacked @ wanted.unsqueeze(2)).cpu()
    weights = torch.linalg.pinv(products, rtol=COLLINEAR, hermitian=True) @ projected
    weights = weights.squeeze(2).T.to(predictions.device)
    missed = (mixed(predictions, weights) - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
    return torch.where(missed > WORST_FIT, torch.ones_like(weights), weights)


def mixed(predictions: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum ``[B, values]``."""
    return torch.einsum("kbv,kb->bv", predictions, weights)
