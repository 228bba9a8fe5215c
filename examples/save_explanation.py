"""Save what ``explain`` says of a network: ``python examples/save_explanation.py [FOLDER]``.

No weights are needed: the network is on the meta device, and nothing is computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

import fisedit_compile as fisedit


def main(folder: Path = Path("example-explanation")) -> None:
    """Write the tables, the costs at several densities, and the graph as a drawing."""
    folder.mkdir(parents=True, exist_ok=True)
    network = nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.SiLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 4, 3, padding=1),
    )
    report = fisedit.explain(network.eval().to("meta"), torch.empty(1, 4, 64, 64, device="meta"))

    (folder / "explanation.txt").write_text(str(report) + "\n", encoding="utf-8")
    costs = {density: report.cost(density).macs / report.total_macs for density in (0.01, 0.05, 0.1, 0.5)}
    numbers = {
        "sparse share": report.sparse_mac_fraction,
        "bytes a recorded call stores": report.bytes_stored,
        "arithmetic of an edit, of a dense call": costs,
        "dense operators": [f"{miss.target}: {miss.reason}" for miss in report.dense_nodes],
    }
    (folder / "explanation.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    report.write_graph(folder / "flow.svg")
    print(f"an edit of 5 % takes {costs[0.05]:.1%} of the arithmetic of a dense call; tables and a drawing in {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
