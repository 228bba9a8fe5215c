"""Segment a picture again of which a part has changed: ``python examples/segmentation.py``.

A U-Net (arXiv 1505.04597) tells for each pixel which of some classes it is. It has random weights here, which cost as
much as trained ones. Something moves in front of the camera; the classes are computed again where the picture differs.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit

CLASSES = 8


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with a norm and a rectifier."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs, momentum=None),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """A U-Net: from a picture ``[B, 3, H, W]`` to scores of classes ``[B, classes, H, W]``."""

    def __init__(self, width: int, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.enter = convolutions(3, width)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(convolutions(fine, coarse) for fine, coarse in pairs)
        self.rise = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in reversed(pairs))
        self.up = nn.ModuleList(convolutions(2 * fine, fine) for fine, _ in reversed(pairs))
        self.leave = nn.Conv2d(width, CLASSES, 1)

    def forward(self, picture: Tensor) -> Tensor:
        levels = [self.enter(picture)]
        for block in self.down:
            levels.append(block(functional.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for rise, block in zip(self.rise, self.up, strict=True):
            x = block(torch.cat([rise(x), levels.pop()], dim=1))
        result: Tensor = self.leave(x)
        return result


def scene(size: int, place: int) -> Tensor:
    """A picture ``[1, 3, H, W]``: an even background with a little noise, and a bright square at a column."""
    generator = torch.Generator().manual_seed(1)
    picture = 0.3 + 0.05 * torch.randn(1, 3, size, size, generator=generator)
    picture += torch.linspace(0, 0.3, size)[:, None]
    side = size // 8
    picture[..., size // 2 : size // 2 + side, place : place + side] = torch.tensor([0.9, 0.7, 0.1])[:, None, None]
    return picture


@torch.no_grad()
def main(width: int = 32, size: int = 256) -> None:
    """Segment a picture, and again after something moved."""
    torch.manual_seed(0)
    network = Segmenter(width).requires_grad_(False)
    before, after = scene(size, place=size // 4), scene(size, place=size // 3)
    network.train()(before)  # the statistics of its norms
    network.eval()
    differs = (before != after).any(dim=1).float()
    # The classes next to what moved may change as well.
    grow = size // 32
    mask = functional.max_pool2d(differs, 2 * grow + 1, stride=1, padding=grow)[0] > 0

    runtime = fisedit.Runtime()
    compiled = torch.compile(network, backend="fisedit", options={"runtime": runtime})
    with runtime.record("picture"):
        first = compiled(before).argmax(dim=1)

    def sparse() -> Tensor:
        with runtime.edit("picture", mask=mask):
            scores: Tensor = compiled(after)
            return scores.argmax(dim=1)

    sparse()  # The first edit measures in which ways its operators are the fastest.
    started = time.perf_counter()
    again = sparse()
    between = time.perf_counter()
    dense = network(after).argmax(dim=1)
    seconds, dense_seconds = between - started, time.perf_counter() - between

    share = fisedit.explain(network, before).sparse_mac_fraction
    print(f"{mask.float().mean():.1%} of the picture is looked at again, {share:.1%} of the arithmetic is sparse")
    times = f"dense {1000 * dense_seconds:.0f} ms, again {1000 * seconds:.0f} ms"
    print(f"{times}: {dense_seconds / seconds:.1f} times as fast")
    print("outside, the same classes:", torch.equal(again[:, ~mask], first[:, ~mask]))
    print(f"of all pixels, the class of the dense run: {(again == dense).float().mean():.2%}")
    print(f"pixels whose class changed: {(again != first).sum()}")


if __name__ == "__main__":
    main()
