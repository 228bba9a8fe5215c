"""What tests of compiled code share."""

from __future__ import annotations

import pytest

from fisedit_compile.operators.native.compiling import NotCompiledError, load_library


@pytest.fixture(scope="module")
def compiler() -> None:
    """Skips where nothing can be compiled: there is nothing to test."""
    try:
        load_library("attention")
    except NotCompiledError as error:
        pytest.skip(str(error))
