"""Record a network of your own and edit a part of what it makes: ``python examples/own_network.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fisedit_compile as fisedit


class Network(nn.Module):
    """A small denoiser: two resolutions, a norm, and an embedding of the timestep."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.leave = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.enter(x) + self.time(time[:, None])[:, :, None, None]
        y = y + nn.functional.interpolate(self.down(nn.functional.silu(self.norm(y))), scale_factor=2)
        result: Tensor = self.leave(nn.functional.silu(y))
        return result


def main() -> None:
    """Ten steps, recorded and edited."""
    torch.manual_seed(0)
    network = Network().eval().requires_grad_(False)
    runtime = fisedit.Runtime()
    compiled = torch.compile(network, backend="fisedit", options={"runtime": runtime})

    noise = torch.randn(1, 4, 64, 64)
    times = torch.linspace(1, 0, 10)[:, None]

    def run(x: Tensor, changed: Tensor | None = None) -> Tensor:
        for time in times:
            given = x if changed is None else x + changed
            x = x - 0.1 * compiled(given, time)
        return x

    with runtime.record("base"):
        before = run(noise)

    mask = torch.zeros(64, 64)
    mask[20:34, 30:48] = 1
    # Inside the mask the network is given something else, as another prompt would.
    with runtime.edit("base", mask=mask) as edit:
        after = run(noise, changed=0.5 * mask)
        print(f"{edit.density:.1%} of the positions were computed in {edit.calls} calls")

    outside = mask == 0
    print("outside the mask, bit by bit the same:", torch.equal(after[..., outside], before[..., outside]))
    print(f"inside, the greatest change: {(after - before).abs().max():.3f}")


if __name__ == "__main__":
    main()
