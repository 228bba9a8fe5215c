"""Edit the label map of a SPADE generator (GauGAN): ``python examples/label_map.py [FOLDER]``.

The generator (arXiv 1903.07291) makes a picture from a map that says what is where. It has random weights here, which
cost as much as trained ones: first with all channels, then with a quarter of them, as GAN Compression (arXiv
2003.08936) reduces it. Each is run once; then a car is put on the road, and only what changes is computed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit

LABELS = SKY, HOUSE, ROAD, TREE, CAR = range(5)


class SpatiallyAdaptiveNorm(nn.Module):
    """Normalisation whose scale and shift are computed from the label map (section 3.1 of the paper)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=None)
        self.shared = nn.Conv2d(len(LABELS), hidden, 3, padding=1)
        self.scale = nn.Conv2d(hidden, channels, 3, padding=1)
        self.shift = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = functional.relu(self.shared(functional.interpolate(labels, size=x.shape[2:], mode="nearest")))
        result: Tensor = self.norm(x) * (1 + self.scale(hidden)) + self.shift(hidden)
        return result


class Block(nn.Module):
    """A residual block; its shortcut is learnt where the number of channels changes (figure 4)."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        between = min(inputs, outputs)
        self.first = SpatiallyAdaptiveNorm(inputs, hidden)
        self.second = SpatiallyAdaptiveNorm(between, hidden)
        self.enter = nn.Conv2d(inputs, between, 3, padding=1)
        self.leave = nn.Conv2d(between, outputs, 3, padding=1)
        self.past = SpatiallyAdaptiveNorm(inputs, hidden) if inputs != outputs else None
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.enter(functional.leaky_relu(self.first(x, labels), 0.2))
        y = self.leave(functional.leaky_relu(self.second(y, labels), 0.2))
        if self.past is not None and self.shortcut is not None:
            x = self.shortcut(self.past(x, labels))
        return x + y


class Generator(nn.Module):
    """From a label map ``[B, labels, H, W]`` to a picture ``[B, 3, H, W]``; the first block sees a 32nd of its size
    (figure 11).

    Args:
        width: channels of the last block, 64 in the paper.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 2 * width
        channels = [16 * width] * 4 + [8 * width, 4 * width, 2 * width, width]
        self.enter = nn.Conv2d(len(LABELS), channels[0], 3, padding=1)
        pairs = zip(channels, channels[1:], strict=False)
        self.blocks = nn.ModuleList(Block(inputs, outputs, hidden) for inputs, outputs in pairs)
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, labels: Tensor) -> Tensor:
        height, width = labels.shape[2] // 32, labels.shape[3] // 32
        x = self.enter(functional.interpolate(labels, size=(height, width), mode="nearest"))
        for number, block in enumerate(self.blocks):
            # The third block works at the resolution of the second.
            if number not in (0, 2):
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = block(x, labels)
        return torch.tanh(self.leave(functional.leaky_relu(x, 0.2)))


def street(size: int) -> Tensor:
    """A label map ``[H, W]``: houses and trees at a road."""
    labels = torch.full((size, size), SKY)
    labels[size // 4 :, : size // 2] = HOUSE
    labels[size // 3 :, size // 2 :] = TREE
    labels[size * 5 // 8 :] = ROAD
    return labels


def with_car(labels: Tensor) -> Tensor:
    """The same street with a car."""
    size, changed = len(labels), labels.clone()
    changed[size * 11 // 16 : size * 13 // 16, size * 3 // 8 : size * 5 // 8] = CAR
    return changed


def as_input(labels: Tensor) -> Tensor:
    """One channel for each label: ``[1, labels, H, W]``."""
    return functional.one_hot(labels, len(LABELS)).movedim(-1, 0)[None].float()


def changed_region(before: Tensor, after: Tensor, grow: int) -> Tensor:
    """Where two label maps differ, and around it, as the generator looks beyond a pixel: bool ``[H, W]``."""
    differs = (before != after).float()[None, None]
    return functional.max_pool2d(differs, 2 * grow + 1, stride=1, padding=grow)[0, 0] > 0


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """What a function returns, and its least time in seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


@torch.no_grad()
def edit(width: int, size: int, repeats: int, folder: Path) -> None:
    """Make a street with a generator, put a car into it, and print what that costs."""
    torch.manual_seed(0)
    before, after = street(size), with_car(street(size))
    network = Generator(width).requires_grad_(False)
    network.train()(as_input(before))  # the statistics of its norms
    network.eval()
    mask = changed_region(before, after, grow=size // 32)

    runtime = fisedit.Runtime()
    compiled = torch.compile(network, backend="fisedit", options={"runtime": runtime})
    with runtime.record("street"):
        base = compiled(as_input(before))

    def sparse() -> Tensor:
        with runtime.edit("street", mask=mask):
            result: Tensor = compiled(as_input(after))
            return result

    sparse()  # The first edit measures in which ways its operators are the fastest.
    edited, sparse_seconds = timed(sparse, repeats)
    dense, dense_seconds = timed(lambda: network(as_input(after)), repeats)
    same = torch.equal(edited[..., ~mask], base[..., ~mask])
    print(
        f"width {width}: {mask.float().mean():.1%} of the picture changed; dense {1000 * dense_seconds:.0f} ms, "
        f"edit {1000 * sparse_seconds:.0f} ms: {dense_seconds / sparse_seconds:.1f} times as fast"
    )
    print(f"  outside the mask, bit by bit the same: {same}")
    far, near = ((picture - dense)[..., mask].abs().mean() for picture in (base, edited))
    print(f"  inside, mean difference to the dense picture: {near:.4f}; of the street without the car: {far:.4f}")
    for name, picture in (("before", base), ("edited", edited), ("dense", dense)):
        pixels = ((picture[0] + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)
        Image.fromarray(pixels.numpy()).save(folder / f"width-{width}-{name}.png")


def main(
    folder: Path = Path("example-label-map"), widths: tuple[int, ...] = (64, 16), size: int = 256, repeats: int = 3
) -> None:
    """The full generator, and the one with fewer channels."""
    folder.mkdir(parents=True, exist_ok=True)
    report = fisedit.explain(Generator(min(widths)).eval(), as_input(street(size)))
    print(f"{report.sparse_mac_fraction:.1%} of the arithmetic is sparse")
    for width in widths:
        edit(width, size, repeats, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
