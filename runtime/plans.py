"""Index plans: everything a compiled edit needs to know about one mask, as small integer tensors.

For a domain, which positions are active; for a stencil, where each tap of each active target position finds its value:
in the rows of the source, in the halo (recorded positions next to the active ones), or outside the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.errors import GraphError
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.spec import Domain, PlanInput, PlanKind, Stencil
from fisedit_compile.runtime.taps import OUTSIDE, axis_taps, subpositions

# A size that can be 0 or 1 forces a compiler to specialise on it, so no index is shorter than this.
MINIMUM_ROWS = 2
#: Least step from one bucket to the next.
BUCKET = 16
#: Side of the tiles of pixels in which rows lie on a GPU.
TILE = 8


def bucket(count: int) -> int:
    """The smallest bucket that holds ``count``: multiples of 16, and from 256 on eight to each doubling.

    Captured launches hold for one size only. Padding up to a bucket makes masks of about the same size one size, for at
    most 15 more rows, or an eighth where that is more.
    """
    step = max(BUCKET, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-max(count, 1) // step) * step


@lru_cache(maxsize=16)
def tile_order(domain: Domain) -> Tensor:
    """All positions of a domain, int64 ``[size]``, tile by tile of 8x8, quarter by quarter inside of a tile.

    Neighbouring rows of a plan in this order are neighbours on the map in both directions: 16 of them are a tile of 4x4
    and 64 one of 8x8, where nothing is inactive. The programs of a kernel, each of which takes so many rows, then read
    positions that they have in common.
    """
    positions = torch.arange(domain.size)
    row, column = positions // domain.width, positions % domain.width
    key = row // TILE * -(-domain.width // TILE) + column // TILE
    side = TILE
    while side > 1:
        side //= 2
        key = key * 4 + row // side % 2 * 2 + column // side % 2
    return key.argsort()


@dataclass(frozen=True)
class DomainPlan:
    """Active positions of a domain.

    Attributes:
        index: int64 ``[1 or B, N]``, distinct positions in each sample: the active ones in ascending order (on a GPU
            in that of :func:`tile_order`), then, where a sample has fewer than N, inactive ones as padding.
        valid: bool ``[1 or B, N]``, False for padding; None when there is none.
        slot: int64 ``[1 or B, size]``, the row of each active position, -1 for every other one.
        density: active share of all positions, from 0 to 1.
    """

    index: Tensor
    valid: Tensor | None
    slot: Tensor
    density: float


class IndexPlan:
    """The plan inputs of one mask; made by :func:`build_plan`."""

    def __init__(self, domains: dict[Domain, DomainPlan], tensors: dict[PlanInput, Tensor | None]) -> None:
        self._domains = domains
        self._tensors = tensors

    def tensor(self, plan_input: PlanInput) -> Tensor | None:
        """The tensor of a plan input; None only for ``valid`` of a domain without padding rows.

        Raises:
            GraphError: the plan was not built for it.
        """
        if plan_input not in self._tensors:
            raise GraphError(
                f"the plan has no {plan_input.kind} of {plan_input.of}; build it with that domain or stencil."
            )
        return self._tensors[plan_input]

    def count(self, domain: Domain) -> int:
        """Number of rows N of a domain: the most active positions of any sample, padding included."""
        return self._domain(domain).index.shape[1]

    def density(self, domain: Domain) -> float:
        """Active share of a domain's positions, from 0 to 1, averaged over the samples."""
        return self._domain(domain).density

    def _domain(self, domain: Domain) -> DomainPlan:
        if domain not in self._domains:
            raise GraphError(f"the plan has no domain {domain}; it has {', '.join(map(str, self._domains))}.")
        return self._domains[domain]

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The domains of the plan, in the order in which they were asked for."""
        return tuple(self._domains)

    @property
    def bytes(self) -> int:
        """Size of all plan tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values() if tensor is not None)


def build_plan(
    fine_mask: Tensor,
    domains: Iterable[Domain],
    stencils: Iterable[Stencil],
    device: torch.device | str,
    bucketed: bool = False,
) -> IndexPlan:
    """Build the index plan of a mask.

    Args:
        fine_mask: bool ``[1 or B, height, width]`` at the mask domain; every domain's mask is reduced from it. Samples
            with the same mask share one plan: batch 1.
        domains: resolutions to plan for; those of the stencils are added.
        stencils: stencils to plan for.
        device: where the plan's tensors go. The plan itself is made on the CPU: it needs the counts of active
            positions on the host.
        bucketed: pad rows and halos to the sizes of :func:`bucket`. Rows then lie in the order of :func:`tile_order`,
            as on every GPU.

    Returns:
        The plan. A mask without any active position is allowed; all rows are padding then.
    """
    padded = bucket if bucketed else _unpadded
    tiled = bucketed or torch.device(device).type != "cpu"
    # Whatever device the user's code makes its tensors on.
    with torch.device("cpu"):
        plans, tensors = _plan(fine_mask.to("cpu"), domains, tuple(dict.fromkeys(stencils)), padded, tiled)
    if torch.device(device).type != "cpu":
        tensors = {key: None if tensor is None else tensor.to(device) for key, tensor in tensors.items()}
    return IndexPlan(plans, tensors)


def _plan(
    mask: Tensor, domains: Iterable[Domain], stencils: Sequence[Stencil], padded: Callable[[int], int], tiled: bool
) -> tuple[dict[Domain, DomainPlan], dict[PlanInput, Tensor | None]]:
    """Plans of the domains, and the tensors of a plan by what they are for, on the host."""
    if mask.shape[0] > 1 and bool((mask == mask[:1]).all()):
        mask = mask[:1]
    ends = [domain for stencil in stencils for domain in (stencil.source, stencil.target)]
    plans = {
        domain: _plan_domain(reduce_mask(mask, domain), padded, tile_order(domain) if tiled else None)
        for domain in dict.fromkeys([*domains, *ends])
    }
    tensors: dict[PlanInput, Tensor | None] = {}
    for domain, plan in plans.items():
        tensors[PlanInput("index", domain)] = plan.index
        tensors[PlanInput("valid", domain)] = plan.valid
    for stencil in stencils:
        for kind, tensor in _plan_stencil(stencil, plans[stencil.source], plans[stencil.target], padded).items():
            tensors[PlanInput(kind, stencil)] = tensor
    return plans, tensors


def _unpadded(count: int) -> int:
    return max(count, MINIMUM_ROWS)


def _plan_domain(mask: Tensor, padded: Callable[[int], int], ranks: Tensor | None) -> DomainPlan:
    """Plan one domain from its mask, bool ``[b, height, width]``.

    ``padded`` says how many rows so many need; ``ranks`` are all positions in the order of rows, None: ascending.
    """
    active = mask.flatten(1)
    batch, size = active.shape
    positions = torch.arange(size) if ranks is None else ranks
    active = active if ranks is None else active[:, ranks]  # [b, size], in the order of rows
    order = active.cumsum(1)  # number of active positions up to and with each one
    counts = order[:, -1]
    slot = torch.where(active, order - 1, -1)
    if ranks is not None:
        slot = torch.empty_like(slot).scatter_(1, ranks.expand(batch, size), slot)
    density = int(counts.sum()) / (batch * size)
    rows = min(size, padded(int(counts.max())))
    if bool((counts == rows).all()):
        return DomainPlan(positions[active.nonzero()[:, 1]].view(batch, rows), None, slot, density)
    # Inactive positions come behind the active ones, so the first N of this permutation are distinct.
    place = torch.where(active, order - 1, counts[:, None] + torch.arange(size) - order)
    index = torch.empty_like(place).scatter_(1, place, positions.expand(batch, size))[:, :rows].contiguous()
    return DomainPlan(index, torch.arange(rows) < counts[:, None], slot, density)


def _tap_positions(stencil: Stencil, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Source position of every tap of the target rows ``index`` [b, N]: int64 [b, N, K], the source's size when
    outside; and float32 weights [b, N, K] or None."""
    batch, rows = index.shape
    width, size = stencil.source.width, stencil.source.size
    row, column = index // stencil.target.width, index % stencil.target.width
    if stencil.kind == "transposition":
        return (column * width + row)[..., None], None
    vertical, horizontal = axis_taps(stencil)
    # An outside coordinate on either axis must leave the map: add so much that the clamp below catches the sum.
    start = torch.where(vertical.source == OUTSIDE, size, vertical.source * width)[row]  # [b, N, taps y]
    step = torch.where(horizontal.source == OUTSIDE, size, horizontal.source)[column]  # [b, N, taps x]
    positions = (start[..., :, None] + step[..., None, :]).clamp_(max=size).view(batch, rows, -1)
    if vertical.weights is None or horizontal.weights is None:
        return positions, None
    weights = vertical.weights[row][..., :, None] * horizontal.weights[column][..., None, :]
    return positions, weights.view(batch, rows, -1)


def _plan_stencil(
    stencil: Stencil, source: DomainPlan, target: DomainPlan, padded: Callable[[int], int]
) -> dict[PlanKind, Tensor]:
    positions, weights = _tap_positions(stencil, target.index)
    batch, size, source_rows = positions.shape[0], stencil.source.size, source.index.shape[1]
    flat = positions.flatten(1)  # [b, N * K]
    # Needed from the recording: positions that are read, inside the map, and no valid row of the source.
    needed = torch.zeros(batch, size + 1, dtype=torch.bool).scatter_(1, flat, True)[:, :size] & (source.slot < 0)
    order = needed.cumsum(1)
    counts = order[:, -1]
    length = padded(int(counts.max()))
    halo = torch.zeros(batch, length, dtype=torch.int64)
    sample, position = needed.nonzero(as_tuple=True)
    halo[sample, order[needed] - 1] = position
    place = torch.empty(batch, size + 1, dtype=torch.int64)
    torch.where(needed, source_rows + order - 1, source.slot, out=place[:, :size])
    place[:, size] = source_rows + length
    table = place.gather(1, flat).view_as(positions)
    planned: dict[PlanKind, Tensor] = {"halo": halo, "table": table, "inside": (positions < size).sum(2)}
    if weights is not None:
        planned["weights"] = weights
    if stencil.kind == "pixel_shuffle":
        planned["subposition"] = subpositions(stencil, target.index)
    return planned
