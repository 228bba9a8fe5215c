"""What documents say can be done can be done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from support.tree import ROOT, installed_files


def test_an_implementation_can_be_added_as_documented(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "adding-an-operator.md").read_text(encoding="utf-8")
    section = text[text.index("## Another way to compute an operator") : text.index("## A new operator of edits")]
    (file,) = re.findall(r"^`(\S+\.py)`:$", section, re.MULTILINE)
    source, program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for name, path in installed_files().items():
        if path.suffix in (".py", ".cpp", ".h"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / name)
    assert not (tmp_path / file).exists()
    (tmp_path / file).write_text(source, encoding="utf-8")
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["taking"]
