"""Kernels run in Triton's interpreter, or on a GPU with FISEDIT_TEST_DEVICE=cuda; generated files go to a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or left in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISEDIT_CACHE_DIR", str(folder))
        patch.delenv("FISEDIT_DUMP_DIR", raising=False)
        patch.delenv("FISEDIT_AUTOTUNE", raising=False)
        yield folder


@pytest.fixture
def kernels_run() -> Iterator[None]:
    """Kernels take the tensors of this test; products of float32 are exact."""
    from fisedit_compile.operators.triton.devices import interpreter, triton_installed

    if not triton_installed():
        pytest.skip("Triton is not installed")
    if os.environ.get("FISEDIT_TEST_DEVICE", "cpu") == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is set, but not to 1")
    # The setting that PyTorch's own code reads; setting precisions one by one makes that an error.
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        if os.environ.get("FISEDIT_TEST_DEVICE", "cpu") == "cpu":
            with interpreter():
                yield
        else:
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
