"""What every test shares: a fresh Dynamo, few threads, poisoned uninitialised memory, one hypothesis profile."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Small tensors gain nothing from threads, and threads of several workers stand in each other's way; so do those of the
# processes that tests start, which take this from the environment. Before PyTorch is imported, which reads it.
SEVERAL = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
if SEVERAL:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Test modules import `support` and the programs of two folders by their bare names, whatever the import mode.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tools"), str(HERE.parent / "benchmarks")]
# Triton decides at its import whether kernels are interpreted, and some test imports it before those of the kernels do.
ON_CPU = os.environ.get("FISEDIT_TEST_DEVICE", "cpu") == "cpu"
if ON_CPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=5, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: searching it for garbage again and again, while Dynamo makes
    a lot, takes a fifth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


def pytest_unconfigure() -> None:
    """Libraries complain of objects that are not collected before the process ends."""
    gc.unfreeze()


def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A creator of uninitialised tensors whose floating-point results are all NaN."""

    def create_poisoned(*arguments: Any, **keywords: Any) -> torch.Tensor:
        tensor = create(*arguments, **keywords)
        if not torch.compiler.is_compiling() and tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return create_poisoned


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """One thread beside other workers, else two."""
    torch.set_num_threads(1 if SEVERAL else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def exact_products() -> None:
    """On a GPU PyTorch convolves float32 with the ten bits of TF32, and the reference on the processor does not."""
    if not ON_CPU:
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Uninitialised floating-point memory is NaN, so that reading it shows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that was measured on this machine before has a part in the tests, and they leave nothing behind.

    Libraries are compiled, and operators are measured, once for all workers and the processes that tests start.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISEDIT_CACHE_DIR", str(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def unmeasured_guards() -> Iterator[None]:
    """Dynamo empties the processor's caches behind each compilation, to log how long its guards take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *given: 0.0)
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dynamo gives up on a function after a few graphs and then runs it eagerly: each test starts with none.

    A module whose tests share compiled networks sets ``KEEPS_DYNAMO = True`` and resets where it builds them.
    """
    if not getattr(request.module, "KEEPS_DYNAMO", False):
        torch.compiler.reset()
    yield
