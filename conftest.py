"""Options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let it look at more than CI does."""
    parser.addoption(
        "--model-steps",
        type=int,
        default=1000,
        metavar="N",
        help="steps of each state machine in tests/properties (default: %(default)s)",
    )
    parser.addoption(
        "--layouts",
        type=int,
        default=1000,
        metavar="N",
        help="layouts in which model and running kernel are compared (default: %(default)s)",
    )


@pytest.fixture(scope="session")
def model_steps(request: pytest.FixtureRequest) -> int:
    """How many steps each state machine is to run, over all its examples."""
    nr: int = request.config.getoption("--model-steps")
    if nr < 1:
        raise pytest.UsageError(f"--model-steps={nr}: allowed 1 and more")
    return nr
