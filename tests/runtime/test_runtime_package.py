"""What importing the package and the runtime costs, and what it offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fisedit_compile
import fisedit_compile.runtime


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_no_torch_and_the_runtime_no_dynamo() -> None:
    code = """
import sys, fisedit_compile as fisedit
print("torch" in sys.modules)
fisedit.Runtime(), fisedit.default_runtime(), fisedit.errors.MaskError
print("torch._dynamo" in sys.modules, "torch.fx" in sys.modules and "fisedit_compile.passes" in sys.modules)
"""
    assert run_python(code).split() == ["False", "False", "False"]


def test_runtime_is_not_importable_under_its_bare_name() -> None:
    code = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import runtime
except ImportError as error:
    print(error)
"""
    folder = Path(next(iter(fisedit_compile.runtime.__path__))).resolve()
    if folder.parent.name == "fisedit_compile":
        pytest.skip("installed as a copy: there is no folder of the bare name")
    assert "import this package as fisedit_compile.runtime" in run_python(code, str(folder.parent))


def test_version_is_the_installed_one() -> None:
    assert fisedit_compile.__version__.split(".")[0].isdigit()


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="'fisedit_compile' has no attribute 'nothing'"):
        _ = fisedit_compile.nothing
    assert {"Runtime", "explain", "__version__", "errors"} <= set(dir(fisedit_compile))


def test_importing_the_module_explain_leaves_the_function_in_the_package() -> None:
    code = """
import fisedit_compile as fisedit, fisedit_compile.reporting.explain as module
print(fisedit.explain is module.explain)
"""
    assert run_python(code).split() == ["True"]
