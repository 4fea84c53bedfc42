"""What a test does where the running kernel, or the user, has not what it needs."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip for `reason`; fail where PYKHUGE_REQUIRE_KERNEL=1 says that it must not lack."""
    if os.environ.get("PYKHUGE_REQUIRE_KERNEL") == "1":
        pytest.fail(f"PYKHUGE_REQUIRE_KERNEL=1, but {reason}")
    pytest.skip(reason)
