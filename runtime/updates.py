"""What a sparse call stores in a new base: the recorded tensors with the call's updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.errors import GraphError
from fisedit_compile.runtime.base import RecordedCall, write_rows
from fisedit_compile.runtime.plans import IndexPlan
from fisedit_compile.runtime.spec import PlanInput, Site


def updated_tensors(
    call: RecordedCall, sites: Sequence[Site], updates: Sequence[Tensor | None], plan: IndexPlan
) -> dict[str, Tensor]:
    """The tensors of a call that is edited, one for each site; the base's lock is held.

    Args:
        call: the recorded one.
        sites: the graph's sites.
        updates: one for each site: the rows ``[B, N, *C]`` of a spatial site, the whole tensor of a value site, or
            None: unchanged. Unchanged tensors are the recorded ones themselves.
        plan: whose rows they are.
    """
    recorded = dict(zip(call, call.stored(), strict=True))
    bytes_loaded = call.bytes_loaded
    result: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for site, update in zip(sites, updates, strict=True):
            if update is None:
                result[site.name] = recorded[site.name]
            elif site.kind != "spatial" or site.domain is None:
                result[site.name] = update
            else:
                index = plan.tensor(PlanInput("index", site.domain))
                valid = plan.tensor(PlanInput("valid", site.domain))
                if index is None:
                    raise GraphError(f"the plan has no index of {site.domain}")
                result[site.name] = write_rows(call[site.name], site, update, index, valid)
    # Not for computing.
    call.bytes_loaded = bytes_loaded
    return result
