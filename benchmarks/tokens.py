"""Edits of a transformer over tokens: the architecture of Flux with fewer blocks, dense against sparse.

python benchmarks/tokens.py --blocks 3,6 --heads 12 --side 32 --prompt 128

Random weights. The mask is a square; all variants rotate over the same calls in one process, interleaved, and sparse
calls are checked first: with unchanged inputs they give the recorded outputs.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import fisedit_compile as fisedit
from fisedit_compile.bench.masks import make_mask
from fisedit_compile.bench.networks import fill_randomly
from fisedit_compile.bench.timing import Variant, measure
from fisedit_compile.bench.unet import describe_machine

WIDTH, TEXT_WIDTH, POOLED_WIDTH = 128, 1024, 768
"""Of a head, of the prompt's tokens, and of the prompt as a whole."""


def build(blocks: tuple[int, int], heads: int) -> FluxTransformer2DModel:
    """The network: ``blocks`` with weights of their own for the prompt, and without; public widths of a head."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=WIDTH,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
    )
    fill_randomly(model.eval().requires_grad_(False), 0)
    return model


def inputs(side: int, prompt: int, seed: int) -> dict[str, Any]:
    """A call's arguments."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": torch.randn((1, side * side, 64), generator=generator),
        "encoder_hidden_states": torch.randn((1, prompt, TEXT_WIDTH), generator=generator),
        "pooled_projections": torch.randn((1, POOLED_WIDTH), generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([torch.zeros(side, side), rows, columns], dim=-1).reshape(-1, 3),
        "txt_ids": torch.zeros(prompt, 3),
        "return_dict": False,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure edits of a transformer over tokens.")
    parser.add_argument("--blocks", default="3,6", help="with weights of their own for the prompt, and without")
    parser.add_argument("--heads", type=int, default=12, help=f"of {WIDTH} channels")
    parser.add_argument("--side", type=int, default=32, help="rows and columns of tokens")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--densities", default="0.02,0.05,0.1,0.2,0.35,0.6", help="shares of active positions")
    parser.add_argument("--calls", type=int, default=4, help="recorded calls")
    parser.add_argument("--repeats", type=int, default=2, help="rounds over all variants")
    given = parser.parse_args()
    first, second = (int(text) for text in given.blocks.split(","))
    densities = tuple(float(text) for text in given.densities.split(","))
    model, runtime = build((first, second), given.heads), fisedit.Runtime()
    options = {"runtime": runtime, "tokens": {"hidden_states": (given.side, given.side)}}
    compiled = torch.compile(model, backend="fisedit", options=options)
    recorded = [inputs(given.side, given.prompt, seed) for seed in range(given.calls)]
    edited = [
        {**inputs(given.side, given.prompt, 100 + seed), "timestep": call["timestep"]}
        for seed, call in enumerate(recorded)
    ]

    def dense(number: int) -> Tensor:
        output: Tensor = model(**edited[number])[0]
        return output

    def sparse(number: int) -> Tensor:
        output: Tensor = compiled(**edited[number])[0]
        return output

    variants = [Variant("dense", dense)]
    with torch.no_grad():
        with runtime.record("base"):
            bases = [compiled(**call)[0] for call in recorded]
        for density in densities:
            mask = make_mask("square", density, given.side, given.side)
            print(f"checking {density:g}", file=sys.stderr)
            with runtime.edit("base", mask=mask):
                for call, base in zip(recorded, bases, strict=True):
                    difference = (compiled(**call)[0] - base).abs().max() / base.abs().max()
                    if not difference < 1e-3:
                        raise SystemExit(f"off by {difference:.2g} where nothing changed")
            edit = partial(runtime.edit, "base", mask=mask)
            with edit():  # warm: its plans are made, the ways to compute it measured
                for number in range(given.calls):
                    sparse(number)
            variants.append(Variant(f"{density:g}", sparse, edit))
        timings = measure(variants, given.calls, given.repeats, torch.device("cpu"))
    report = fisedit.explain(compiled, **recorded[0])
    print(", ".join(f"{key} {value}" for key, value in describe_machine(torch.device("cpu")).items()))
    print(
        f"{first} and {second} blocks, {given.heads} heads of {WIDTH}, {given.side}x{given.side} tokens, prompt of "
        f"{given.prompt}, fp32, square masks, {100 * report.sparse_mac_fraction:.1f} % on rows; median seconds a call"
    )
    best = timings["dense"].median
    print(f"{'density':>8} {'seconds':>8} {'speed-up':>9} {'arithmetic':>11}")
    print(f"{'dense':>8} {best:>8.3f} {1:>8.2f}x {1:>10.2f}x")
    for density in densities:
        seconds, saved = timings[f"{density:g}"].median, report.total_macs / report.cost(density).macs
        print(f"{density:>8g} {seconds:>8.3f} {best / seconds:>8.2f}x {saved:>10.2f}x")


if __name__ == "__main__":
    main()
