"""What all tests share."""

import warnings
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """What the package itself uses must not be deprecated: tomorrow's break of torch or Lightning shows today."""
    for category in (DeprecationWarning, FutureWarning):  # pytest forgets them after the test
        warnings.filterwarnings("error", category=category, module="lightning_stosign")
    return (yield)
