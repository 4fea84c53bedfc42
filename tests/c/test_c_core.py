"""The C core's own tests, as the Makefile runs them, with every compiler at hand."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_core_alone_passes_under_the_sanitizers(compiler: str, tmp_path: Path) -> None:
    """Positions and neighbours, sanitized and as shipped."""
    if shutil.which(compiler) is None or shutil.which("make") is None:
        pytest.skip(f"needs {compiler} and make")
    done = subprocess.run(
        ["make", "-s", "-C", HERE, f"CC={compiler}", f"BUILD={tmp_path}", "check"],
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": "-j2"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
