"""The README is true."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_readme_sessions_print_what_they_say() -> None:
    """Every example can be typed in as it stands."""
    failed, attempted = doctest.testfile(str(README), module_relative=False)
    assert attempted > 10
    assert failed == 0


def test_readme_shows_files_that_exist() -> None:
    """Every relative link leads somewhere."""
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
