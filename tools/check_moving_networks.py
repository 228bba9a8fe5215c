"""Try many random networks that move positions: the definition by itself, and the compiler against it.

    python tools/check_moving_networks.py --count 5000 --seed 0
    python tools/check_moving_networks.py --count 1000 --only definition

Prints how many networks and positions were checked and stops at the first network that fails, with what it does; its
seed is the number to pass as ``--seed`` with ``--count 1``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from support.moving_checks import Counts, check, compile_graph, compile_with_dynamo
from support.moving_networks import Seeded, draw


def main() -> int:
    """Run the command line; 1 if a network failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--only", choices=("definition", "graph", "dynamo"), default="graph", help="what is compared")
    parser.add_argument("--joined", action="store_true", help="with attention and norms")
    parser.add_argument("--keep-going", action="store_true", help="count the networks that fail instead of stopping")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compilers = {"definition": [], "graph": [compile_graph], "dynamo": [compile_with_dynamo]}[arguments.only]
    counts, failed, started = Counts(), [], time.perf_counter()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        choices = Seeded(seed)
        network = draw(choices, arguments.joined)
        mask = network.mask(choices)
        try:
            counts.add(check(network, mask, compilers))
        except AssertionError as error:
            failed.append(seed)
            if not arguments.keep_going:
                print(f"seed {seed} failed\n{network}\nmask {describe(mask)}\n{error}")
                break
        if (seed - arguments.seed + 1) % 100 == 0:
            print(f"{seed - arguments.seed + 1} tried, {len(failed)} failed: {counts}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{counts}\n{len(failed)} failed of {counts.networks + len(failed)} networks, {seconds:.0f} s")
    print(f"seeds of those that failed: {failed}" if failed else "no mismatch")
    return 1 if failed else 0


def describe(mask: torch.Tensor) -> str:
    """A mask in one line: its rows as hexadecimal numbers."""
    rows = ("".join("1" if cell else "0" for cell in row.tolist()) for row in mask)
    return " ".join(f"{int(row, 2):x}" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
