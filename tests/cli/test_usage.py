"""What the command says when it cannot be done: one line that names what is allowed, status 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_kit import HPAGE, PAGE, MakeFile, pykhuge

from pykhuge.cli import main

WRONG = {
    "page behind the file": (["--poison", "2"], "--poison 2: page 2: allowed 0..1"),
    "page far behind": (["--poison", "99999999999999999999"], "allowed 0..1"),
    "line 64": (["--poison", "0:64"], "--poison 0:64: line 64: allowed 0..63"),
    "no page": (["--poison", ":3"], "--poison :3: page : allowed 0..1"),
    "no line": (["--poison", "1:"], "--poison 1:: line : allowed 0..63"),
    "two lines": (["--poison", "1:2:3"], "--poison 1:2:3: line 2:3: allowed 0..63"),
    "words": (["--poison", "one"], "--poison one: page one: allowed 0..1"),
    "negative page": (["--poison=-1"], "--poison -1: page -1: allowed 0..1"),
    "hexadecimal": (["--poison", "0x1"], "--poison 0x1: page 0x1: allowed 0..1"),
    "other digits": (["--poison", "\N{ARABIC-INDIC DIGIT ONE}"], "allowed 0..1"),
    "thousands of digits": (["--poison", "1" * 5000], "allowed 0..1"),
    "too many": (["--poison-random", "129"], "--poison-random 129: allowed 1..128"),
    "more than are left": (["--poison", "0", "--poison-random", "128"], "allowed 1..127"),
    "zero": (["--poison-random", "0"], "--poison-random 0: allowed 1..128"),
    "not a number": (["--poison-random", "x"], "--poison-random x: allowed 1..128"),
    "seed alone": (["--seed", "1"], "--seed 1: allowed with --poison-random N"),
    "seed negative": (["--poison-random", "1", "--seed=-1"], "--seed -1: allowed 0 and more"),
    "unknown option": (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    "abbreviated option": (["--no-rec"], "unrecognized arguments: --no-rec"),
    "option without its value": (["--poison"], "expected one argument"),
    "two files": (["other"], "unrecognized arguments: other"),
    "picture in no directory": (
        ["--svg", "/nonexistent/a.svg"],
        "No such file or directory: /nonexistent",
    ),
    "picture is a directory": (["--svg", "/"], "--svg /: is a directory"),
}

NOBODY = 65534


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named_with_what_is_allowed(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str], arguments: tuple[list[str], str]
) -> None:
    """One line on stderr, nothing on stdout, status 2."""
    given, expected = arguments
    assert main(["collapse", str(make_file(PAGE + 1)), *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert expected in printed.err


def test_a_file_that_cannot_be_taken_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, a directory, empty, a pipe (which must not be waited for), a name with a NUL."""
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    said = {}
    for name in ("missing", ".", "empty", "pipe", "null\0"):
        assert main(["collapse", f"{tmp_path}/{name}"]) == 2
        said[name] = capsys.readouterr().err
        assert said[name].count("\n") == 1
    assert "No such file or directory" in said["missing"]
    assert "is a directory" in said["."]
    assert "is empty" in said["empty"]
    assert "regular file" in said["pipe"]
    assert "null" in said["null\0"]


def test_a_file_without_permission_is_named(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's own words, status 2."""
    path = make_file(PAGE)
    path.chmod(0)
    own = os.geteuid()
    if own == 0:  # who may read everything
        os.seteuid(NOBODY)
    try:
        status = main(["collapse", str(path)])
    finally:
        os.seteuid(own)
    assert status == 2
    assert "Permission denied" in capsys.readouterr().err


def test_files_without_a_size_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """/proc files say that they are empty, devices are not regular: both are refused."""
    for path in ("/proc/self/maps", "/dev/zero"):
        assert main(["collapse", path]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_becomes_shorter_is_told(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of a file that was cut while it was read is no zeros."""
    path = make_file(PAGE)
    monkeypatch.setattr("pykhuge.cli.collapse._file_size", lambda _: 2 * PAGE)
    assert main(["collapse", str(path)]) == 2
    assert "became shorter" in capsys.readouterr().err


def test_the_picture_cannot_replace_the_file(
    make_file: MakeFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """--svg FILE is refused, and FILE is as it was."""
    path = make_file(PAGE)
    before = path.read_bytes()
    assert main(["collapse", str(path), "--svg", str(path)]) == 2
    assert "is FILE itself" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """It names what is missing."""
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
    assert main(["frobnicate"]) == 2
    assert "collapse" in capsys.readouterr().err


def test_help_documents_exit_status_and_keys() -> None:
    """--help is printed by both names of the command, and --version too."""
    helped = pykhuge("collapse", "--help")
    assert helped.returncode == 0
    for promised in ("exit status:", "--poison-random", "ranges_not_reached", "machine_check"):
        assert promised in helped.stdout
    assert pykhuge("--version").stdout.startswith("pykhuge ")


WITHOUT_RICH = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from pykhuge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_rich_json_works_and_the_picture_says_what_to_install(
    make_file: MakeFile, tmp_path: Path
) -> None:
    """An extra is missing: --json does without it, the rest tells how to get it before any work."""
    path = make_file(HPAGE)
    for arguments in ([], ["--json", "--svg", tmp_path / "a.svg"]):
        ran = pykhuge("collapse", path, *arguments, launcher=WITHOUT_RICH)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.count("\n") == 1
        assert 'pip install "pykhuge[cli]"' in ran.stderr
    assert pykhuge("collapse", path, "--json", launcher=WITHOUT_RICH).returncode == 0


def test_a_reader_that_goes_away_is_no_error_of_ours(make_file: MakeFile) -> None:
    """`| head` ends the command quietly, as SIGPIPE would."""
    command = [sys.executable, "-m", "pykhuge", "collapse", str(make_file(HPAGE)), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()


def test_a_full_disk_is_told_in_one_line(make_file: MakeFile) -> None:
    """Output that cannot be written is status 2, not a traceback."""
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        ran = pykhuge(
            "collapse",
            make_file(PAGE),
            "--json",
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
            env=buffered,
        )
    assert ran.returncode == 2
    assert ran.stderr == "pykhuge: the output cannot be written: No space left on device\n"


def test_ctrl_c_ends_it_in_one_line(tmp_path: Path) -> None:
    """Status 130, as a shell has it for SIGINT."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 << 30)
    script = (
        "import signal, sys; from pykhuge.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
        "print('up', flush=True); sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "collapse", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "pykhuge: interrupted\n")
    assert process.returncode == 130
