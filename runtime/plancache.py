"""Index plans of the masks in use: building one takes milliseconds, a run asks for it at every call."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from fisedit_compile.runtime.masks import reduce_mask, tile_mask
from fisedit_compile.runtime.plans import IndexPlan, build_plan
from fisedit_compile.runtime.spec import Domain, Stencil
from fisedit_compile.runtime.stats import StatsCounter

KEPT = 16
"""Plans kept for masks that come again."""


class PlanSpec(NamedTuple):
    """What a graph needs planned; a plain tuple of the same fields will do as well.

    Attributes:
        mask_domain: finest resolution among the network's spatial inputs.
        domains, stencils: what its graph inputs refer to.
        batch: batch size of its spatial inputs.
        device: where its tensors are.
        bucketed: whether rows and halos are padded, see ``plans.bucket``.
    """

    mask_domain: Domain
    domains: tuple[Domain, ...]
    stencils: tuple[Stencil, ...]
    batch: int
    device: torch.device
    bucketed: bool = False


class PlanCache:
    """The plans last used, by content of the mask. May be used by several threads."""

    def __init__(self, counter: StatsCounter) -> None:
        self._counter = counter
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[object, ...], IndexPlan] = OrderedDict()

    def skip(self, mask: Tensor, spec: PlanSpec) -> None:
        """Check and count a mask of everything, for a graph that then runs densely and needs no plan.

        Raises:
            MaskError: ``spec.batch`` is not a multiple of the mask's samples.
        """
        tile_mask(mask, spec.batch)
        self._counter.set_density({str(domain): 1.0 for domain in (spec.mask_domain, *spec.domains)})

    def get(self, mask: Tensor, spec: PlanSpec) -> tuple[IndexPlan | None, float]:
        """The plan of ``mask`` and the active fraction of the mask domain.

        Args:
            mask: bool ``[1 or samples, height, width]`` on the CPU, of any resolution.
            spec: what to plan for.

        Returns:
            ``(None, 0.0)`` when nothing is active; else the plan and its density at the mask domain, 0 to 1.

        Raises:
            MaskError: ``spec.batch`` is not a multiple of the mask's samples.
        """
        started = time.perf_counter()
        # Tiled first: a wrong batch is an error even if the mask is empty.
        fine = reduce_mask(tile_mask(mask, spec.batch), spec.mask_domain).cpu()
        density = float(fine.float().mean())
        if density == 0.0:
            self._counter.set_density({str(domain): 0.0 for domain in (spec.mask_domain, *spec.domains)})
            return None, density
        content = (tuple(fine.shape), fine.numpy().tobytes(), spec)
        with self._lock:
            plan = self._plans.get(content)
            if plan is not None:
                self._plans.move_to_end(content)
        if plan is None:
            # Kept for later runs, which may be outside inference mode.
            with torch.inference_mode(False):
                plan = build_plan(fine.clone(), spec.domains, spec.stencils, spec.device, spec.bucketed)
            with self._lock:
                self._plans[content] = plan
                while len(self._plans) > KEPT:
                    self._plans.popitem(last=False)
        self._counter.add_plan(time.perf_counter() - started)
        densities = {str(domain): plan.density(domain) for domain in plan.domains}
        self._counter.set_density({str(spec.mask_domain): density} | densities)
        return plan, density
