"""Without its file an implementation is gone, and everything else imports and runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.tree import installed_files

#: Records and edits a network of convolutions, norms, products and attention; prints who computes what.
PROGRAM = """
import importlib, json, pkgutil, torch
from torch import nn
import fisedit_compile
from fisedit_compile.operators.library import OPERATORS

for module in pkgutil.walk_packages(fisedit_compile.operators.__path__, "fisedit_compile.operators."):
    if "triton_kernels" not in module.name:
        importlib.import_module(module.name)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first = nn.GroupNorm(4, 64), nn.Conv2d(64, 64, 3, padding=1)
        self.inside, self.outside = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        x = x + self.first(nn.functional.silu(self.norm(x)))
        tokens = self.inside(x.flatten(2).transpose(1, 2)).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*tokens.unbind(0)).transpose(1, 2).flatten(2)
        return self.outside(attended).transpose(1, 2).unflatten(2, x.shape[2:])

torch.manual_seed(0)
block, x, runtime, mask = Block(), torch.randn(1, 64, 32, 32), fisedit_compile.Runtime(), torch.zeros(32, 32)
mask[3:9, 4:12] = 1
changed = x + mask * torch.randn(1, 64, 32, 32)
compiled = torch.compile(block, backend="fisedit", options={"runtime": runtime})
with torch.no_grad():
    with runtime.record("base"):
        before = compiled(x)
    with runtime.edit("base", mask=mask):
        after = compiled(changed)
    with runtime.edit("base", mask=torch.ones(32, 32)):
        everything = compiled(changed)
    torch.testing.assert_close(everything, block(changed), rtol=1e-4, atol=1e-4)
assert torch.equal(after[..., mask == 0], before[..., mask == 0]) and not torch.equal(after, before)
print(json.dumps({operator.name: [one.name for one in operator.implementations] for operator in OPERATORS.values()}))
"""


@pytest.mark.parametrize(
    ("files", "gone"),
    [
        (["attention/native.py"], {"attend": "compiled"}),
        (["group_norm/native.py"], {"norm_partials": "compiled", "norm_totals": "compiled", "norm_apply": "compiled"}),
        (
            ["products/native.py", "convolution/native.py", "attention/triton.py"],
            {
                **dict.fromkeys(("linear_rows", "pack_matrix", "linear_map", "conv_tiles"), "compiled"),
                "conv_choice": "compiled tiles",
                "attention_rows": "triton",
            },
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_implementation_without_its_file(tmp_path: Path, files: list[str], gone: dict[str, str]) -> None:
    for name, path in installed_files().items():
        if path.suffix in (".py", ".cpp", ".h"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / name)
    for file in files:
        (tmp_path / "fisedit_compile" / "operators" / file).unlink()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", f"{PROGRAM}\nassert fisedit_compile.__file__.startswith({str(tmp_path)!r})"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[operator] and name not in found[operator] for operator, name in gone.items())
    assert found["conv_rows"] == ["aten", "triton"], "the others are there"
