"""With inductor as the lowering, a second process finds what the first compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, torch
from torch import nn
from torch._dynamo.utils import counters
import fisedit_compile as fisedit

torch.manual_seed(0)
runtime = fisedit.Runtime()
options = {"runtime": runtime, "lowering": "inductor"}
network = torch.compile(nn.Conv2d(4, 6, 3, padding=1), backend="fisedit", options=options)
x, changed, mask = torch.zeros(1, 4, 8, 9), torch.ones(1, 4, 8, 9), torch.zeros(8, 9)
mask[2:5, 3:7] = 1
with torch.no_grad():
    with runtime.record("base"):
        network(x)
    with runtime.edit("base", mask=mask):
        result = network(changed)
found = {**counters["inductor"], **counters["aot_autograd"]}
names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "autograd_cache_hit", "autograd_cache_miss")
print(json.dumps({"sum": float(result.sum()), **{name: found.get(name, 0) for name in names}}))
"""


def run(cache: Path) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_process_hits_both_caches(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert first["fxgraph_cache_miss"] == first["autograd_cache_miss"] == 2, "one for record, one for edit"
    assert second["fxgraph_cache_hit"] == second["autograd_cache_hit"] == 2
    assert second["fxgraph_cache_miss"] == second["autograd_cache_miss"] == 0
    assert second["sum"] == first["sum"]
