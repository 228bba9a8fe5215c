"""Record a foreign network, edit it, and compare with the network itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.spec import Domain
from foreign_networks import Foreign

LEAST_CHANGE = 5e-4
"""Networks whose output changes by less, relative to its greatest number, show nothing."""
CLASS_TOKENS = 8
"""At most so many tokens in front of those of a picture."""


def tensors(value: Any) -> Iterator[Tensor]:
    """All float tensors of a result, whatever holds them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)


def draw_weights(network: nn.Module) -> None:
    """Replace weights that are all the same number, as many networks begin: zeros would hide what lies before them."""
    for weight in network.parameters():
        if weight.is_floating_point() and weight.numel() and bool((weight == weight.flatten()[0]).all()):
            middle = weight.flatten()[0] if abs(float(weight.flatten()[0])) > 0.01 else 0.0
            weight.copy_(middle + 0.2 * torch.randn_like(weight))
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def ragged_mask(height: int, width: int) -> Tensor:
    """Off the middle, with an uneven outline: bool ``[height, width]``."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    radius = 0.3 * height * (1 + 0.25 * torch.cos(5 * torch.atan2(rows - 0.4 * height, columns - 0.6 * width)))
    return torch.hypot(rows - 0.4 * height, columns - 0.6 * width) < radius


def border_mask(height: int, width: int) -> Tensor:
    """Most of the picture, up to three of its borders, with an edge in steps: bool ``[height, width]``."""
    edge = (0.75 * width) + (torch.arange(height) // 5 % 3) * 2
    return torch.arange(width) < edge[:, None]


def as_map(value: Tensor, height: int, width: int) -> Tensor | None:
    """An output as ``[batch, height, width, channels]`` if its shape tells its picture; class tokens are left out."""
    if value.dim() == 4:
        first, last = value.shape[1:3], value.shape[2:4]
        wanted = height / width
        if abs(last[0] / max(last[1], 1) - wanted) <= abs(first[0] / max(first[1], 1) - wanted):
            return value.permute(0, 2, 3, 1)
        return value
    if value.dim() == 3:
        for patch in (1, 2, 4, 8, 14, 16, 32):
            rows, columns = height // patch, width // patch
            front = value.shape[1] - rows * columns
            if height % patch == 0 and width % patch == 0 and rows * columns > 1 and 0 <= front <= CLASS_TOKENS:
                return value[:, front:].reshape(value.shape[0], rows, columns, -1)
    return None


def grown(mask: Tensor) -> Tensor:
    """A mask with the positions beside it: outputs of another size that moved are masked by where they lie."""
    return functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0


def fits(size: int, picture: int) -> bool:
    """Whether a size is the picture's, a multiple or a part of it."""
    return size > 1 and (size % picture == 0 or picture % size == 0)


def calibrate(network: nn.Module, picture: Tensor, others: tuple[Any, ...]) -> None:
    """Set the statistics of batch norms by a run: with those of new norms, values fade away in deep networks."""
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train(norm.running_mean is not None)
    if norms and not others:
        network(torch.cat((picture, torch.rand_like(picture))))
    for norm in norms:
        norm.eval()


class Checks:
    """One network, recorded on one picture.

    Attributes:
        compiled: the compiled network.
        inside: positions of outputs, over all masks, that depend on nothing outside of the mask and change.
        fringe: positions of outputs of another size than the picture's that changed right beside the mask.
        change: by how much outputs change between the two pictures, relative to their greatest number.
        unmasked: calls with a part of the picture as their mask that ran without it.
    """

    def __init__(self, foreign: Foreign) -> None:
        self.network = foreign.build().eval().requires_grad_(False)
        draw_weights(self.network)
        shape = (1, foreign.channels, *foreign.size)
        self.old, self.new, self.third = (torch.rand(shape) for _ in range(3))
        self.others = foreign.others()
        self.height, self.width = foreign.size
        calibrate(self.network, self.old.clone(), self.others)
        self.recorded = self.dense(self.old)
        self.expected = self.dense(self.new)
        if not all(bool(torch.isfinite(value).all()) for value in (*self.recorded, *self.expected)):
            raise ValueError("the network gives values that are not finite")
        changes = [self.distance(new, old) for new, old in zip(self.expected, self.recorded, strict=True)]
        sizes = [float(value.abs().max()) for value in self.recorded]
        self.tolerances = [1e-3 * c + 1e-5 * s + 1e-12 for c, s in zip(changes, sizes, strict=True)]
        self.change = max(c / (s + 1e-12) for c, s in zip(changes, sizes, strict=True))
        if self.change < LEAST_CHANGE:
            raise ValueError(f"two pictures give almost the same result (they differ by {self.change:.2g})")
        self.runtime = fisedit.Runtime()
        self.compiled = torch.compile(
            self.network, backend="fisedit", dynamic=False, options={"runtime": self.runtime, **foreign.options}
        )
        self.inside = self.unmasked = self.fringe = 0

    @staticmethod
    def distance(first: Tensor, second: Tensor) -> float:
        """The greatest difference; of what is NaN, infinite."""
        return float((first.double() - second.double()).abs().nan_to_num(nan=torch.inf).max()) if first.numel() else 0.0

    def dense(self, picture: Tensor) -> list[Tensor]:
        """Outputs of the network itself."""
        return [value.clone() for value in tensors(self.network(picture.clone(), *self.others))]

    def edit(self, picture: Tensor, mask: Tensor) -> list[Tensor]:
        """Outputs of an edit."""
        with self.runtime.edit("base", mask=mask):
            return [value.clone() for value in tensors(self.compiled(picture.clone(), *self.others))]

    def run(self) -> list[str]:
        """All checks; what does not hold, in words."""
        with self.runtime.record("base"):
            recorded = [value.clone() for value in tensors(self.compiled(self.old.clone(), *self.others))]
        wrong = self.compare("the recording", recorded, self.recorded)
        for name, mask in (
            ("ragged", ragged_mask(self.height, self.width)),
            ("border", border_mask(self.height, self.width)),
        ):
            before = self.runtime.stats.calls["dense"]
            edited = self.edit(self.new, mask)
            self.unmasked += self.runtime.stats.calls["dense"] - before
            wrong += self.check_outside(name, mask, edited, recorded)
            wrong += self.check_inside(name, mask, edited)
            wrong += self.compare(f"an unchanged picture, {name}", self.edit(self.old, mask), recorded)
        everything = torch.ones(self.height, self.width, dtype=torch.bool)
        return wrong + self.compare("a mask of everything", self.edit(self.new, everything), self.expected)

    def compare(self, what: str, found: list[Tensor], wanted: list[Tensor]) -> list[str]:
        """Whether all outputs are equal within their tolerances."""
        wrong = []
        for number, (one, other, tolerance) in enumerate(zip(found, wanted, self.tolerances, strict=True)):
            error = self.distance(one, other)
            if error > tolerance:
                wrong.append(f"{what}: output {number} is off by {error:.3g} (tolerance {tolerance:.3g})")
        return wrong

    def check_outside(self, name: str, mask: Tensor, edited: list[Tensor], recorded: list[Tensor]) -> list[str]:
        """Positions outside of the mask are those of the recording."""
        wrong = []
        for number, (now, before) in enumerate(zip(edited, recorded, strict=True)):
            first, second = as_map(now, self.height, self.width), as_map(before, self.height, self.width)
            if first is None or second is None:
                continue
            size = (first.shape[1], first.shape[2])
            if not (fits(size[0], self.height) and fits(size[1], self.width)):
                continue
            active = reduce_mask(mask[None], Domain(*size))
            changed = (first != second).any(-1) & ~active
            beyond = int((changed & ~reduce_mask(grown(mask)[None], Domain(*size))).sum())
            self.fringe += int(changed.sum()) - beyond
            if beyond or (changed.any() and size == (self.height, self.width)):
                count = f"{int(changed.sum())} of {int((~active).sum())}"
                text = f"{count} outside of output {number} {size} changed, {beyond} not beside the mask"
                wrong.append(f"{name} mask: {text}")
        return wrong

    def check_inside(self, name: str, mask: Tensor, edited: list[Tensor]) -> list[str]:
        """Positions that depend on the inside only are those of the network on the mixed picture."""
        mixed = self.dense(torch.where(mask, self.new, self.old))
        other = self.dense(torch.where(mask, self.new, 2 * self.third))
        undefined = self.dense(torch.where(mask, self.new, torch.nan))
        wrong = []
        for number, found in enumerate(edited):
            kept = torch.isfinite(undefined[number]) & (other[number] == mixed[number])
            kept &= mixed[number] != self.recorded[number]
            errors = (found - mixed[number]).abs()
            bad = kept & ~(errors <= self.tolerances[number])
            self.inside += int(kept.sum())
            if bad.any():
                error = float(errors[bad].max())
                text = f"{int(bad.sum())} of {int(kept.sum())} inside of output {number} {tuple(found.shape)}"
                wrong.append(f"{name} mask: {text} are off by up to {error:.3g} (change {self.change:.3g})")
        return wrong
