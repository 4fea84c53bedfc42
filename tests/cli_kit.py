"""The command as its users run it: in a process of its own, or `main` in this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = 4096
HPAGE = 512 * PAGE

MakeFile = Callable[..., Path]
RunJson = Callable[..., dict[str, Any]]


def pykhuge(
    *arguments: object, launcher: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`python -m pykhuge ...`, or a script that runs it, without a terminal."""
    start = ["-m", "pykhuge"] if launcher is None else ["-c", launcher]
    command = [sys.executable, *start, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, check=False, **options)
