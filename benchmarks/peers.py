"""The same edits by the operators of the ``sige`` package and by this one, side by side.

python benchmarks/peers.py --model sd15 --size 512 --densities 0.01,0.02,0.05,0.1,0.2

Both sides record the same calls and edit them under the same masks, rotating over the calls, in one process and
interleaved. ``sige`` reuses the recorded statistics of norms, as does the row ``norm cached`` here; the default updates
them exactly. It computes whole blocks of pixels around the mask, so it computes more positions than the mask has.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from fisedit_compile.bench.masks import SHAPES, make_mask
from fisedit_compile.bench.timing import Variant, measure
from fisedit_compile.bench.unet import Bench, Settings, describe_machine

try:
    from sige_network import Network
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "sige":
        raise
    sys.exit(
        "peers.py needs the package sige, which is not installed. Its version 0.3.0 imports build_ext from "
        "torch.utils.cpp_extension, where newer PyTorch no longer has it: get its source distribution, import "
        "build_ext from setuptools.command.build_ext in its setup.py, and install it with --no-build-isolation."
    )


def _check(network: Network, bench: Bench, mask: Tensor) -> None:
    """With unchanged inputs sparse calls agree with the recorded ones; with others, the inside of the mask changes."""
    with network.edit(mask):
        for number, (call, recorded) in enumerate(zip(bench.calls, bench.recorded, strict=True)):
            args, kwargs = call.recorded
            difference = (network.call(number, *args, **kwargs)[0] - recorded).abs().max() / recorded.abs().max()
            if not difference < 1e-3:
                raise SystemExit(f"the network over sige is off by {difference:.2g} where nothing changed")
            args, kwargs = call.edited
            changed = (network.call(number, *args, **kwargs)[0] != recorded).any(dim=1)
            if not changed[:, mask].any():
                raise SystemExit("the network over sige changes nothing inside the mask")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure this package beside sige.")
    parser.add_argument("--model", default="sd15", help="sd15 or sd21, or a folder with a U-Net's configuration")
    parser.add_argument("--size", type=int, default=512, help="of the picture in pixels")
    parser.add_argument("--densities", default="0.01,0.02,0.05,0.1,0.2", help="shares of active positions")
    parser.add_argument("--shape", default="square", choices=SHAPES, help="of the masks")
    parser.add_argument("--calls", type=int, default=4, help="recorded calls")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all variants")
    given = parser.parse_args()
    densities = tuple(float(text) for text in given.densities.split(","))
    settings = Settings(
        model=given.model,
        size=given.size,
        densities=densities,
        shape=given.shape,
        calls=given.calls,
        repeats=given.repeats,
    )

    def say(step: str) -> None:
        print(step, file=sys.stderr)

    with torch.no_grad():
        exact = Bench(settings, say)
        exact.record()
        cached = Bench(replace(settings, norm="cached"), say, exact.model)
        cached.record()
        network = Network(exact.model)
        for number, call in enumerate(exact.calls):
            args, kwargs = call.recorded
            network.record(number, *args, **kwargs)
        height, width = exact.calls[0].recorded[0][0].shape[-2:]
        variants = exact.dense_variants()
        for density in densities:
            mask = make_mask(given.shape, density, height, width, settings.seed)
            for name, bench in (("exact", exact), ("cached", cached)):
                say(f"checking norm {name} at {density:g}")
                bench.check(mask)
                variants.append(replace(bench.sparse_variant(density, mask), name=f"norm {name} {density:g}"))
            say(f"checking sige at {density:g}")
            _check(network, exact, mask)
            variants.append(_variant(network, exact, density, mask))
        timings = measure(variants, settings.calls, settings.repeats, exact.device, say)
    print(", ".join(f"{key} {value}" for key, value in describe_machine(exact.device).items()))
    print(f"{given.model} at {given.size}, batch {settings.batch}, fp32, {given.shape} masks; median seconds of a call")
    best = min(timings[name].median for name in ("eager", "channels last"))
    print(f"dense: {best:.3f}")
    print(f"{'density':>8} {'sige':>8} {'exact':>8} {'cached':>8} {'sige/exact':>11} {'sige/cached':>12}")
    for density in densities:
        sige, rows, reused = (timings[f"{name} {density:g}"].median for name in ("sige", "norm exact", "norm cached"))
        print(f"{density:>8g} {sige:>8.3f} {rows:>8.3f} {reused:>8.3f} {sige / rows:>10.1f}x {sige / reused:>11.1f}x")


def _variant(network: Network, bench: Bench, density: float, mask: Tensor) -> Variant:
    def call(number: int) -> Tensor:
        args, kwargs = bench.calls[number].edited
        output: Tensor = network.call(number, *args, **kwargs)[0]
        return output

    def context() -> AbstractContextManager[None]:
        return network.edit(mask)

    return Variant(f"sige {density:g}", call, context)


if __name__ == "__main__":
    main()
