"""The examples do what their output files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_example_prints_its_output_file(script: Path) -> None:
    """Each script prints what stands in the .out file beside it, byte for byte."""
    printed = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    ).stdout
    assert printed == script.with_suffix(".out").read_text()
