"""Fixtures of the command's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import MakeFile, RunJson

from pykhuge.cli import main
from pykhuge.cli.experiment import Experiment


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """Files in which every 8-byte word differs from every other."""

    def make(nr_bytes: int, name: str = "data") -> Path:
        words = np.arange(1, nr_bytes // 8 + 2, dtype=np.uint64)
        path = tmp_path / name
        path.write_bytes((words * np.uint64(0x9E3779B97F4A7C15)).tobytes()[:nr_bytes])
        return path

    return make


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunJson:
    """`pykhuge collapse ... --json` in this process, what it prints, its machine audited."""
    made: list[Experiment] = []
    initialise = Experiment.__init__

    def remember(self: Experiment, *arguments: Any) -> None:
        initialise(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Experiment, "__init__", remember)

    def run(*arguments: object) -> dict[str, Any]:
        status = main(["collapse", *map(str, arguments), "--json"])
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert report["exit_status"] == status
        if report["panic"] is None:
            made[-1].machine.audit()
        return report

    return run
