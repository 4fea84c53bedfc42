"""The layout on the running kernel, in a process of its own.

`Host` forks a process that forks one for each layout: what a layout leaves behind goes with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from pykhuge.tools.conform.knobs import KHUGEPAGED_SLEEPS, THP
from pykhuge.tools.conform.layout import BLOCK, NR, PAGE, Layout, Stroke, parse, runs
from pykhuge.tools.conform.observe import (
    BASE,
    COUNTERS,
    Event,
    Outcome,
    Words,
    contents,
    observe,
    parse_events,
)

__all__ = ["Host", "HostError", "serve"]

ALIAS, PROBE = BASE + (1 << 30), BASE + (3 << 30)
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 1, 2, 0x10, 0x20, 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
KEEP_SIZE, PUNCH_HOLE = 1, 2
DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, PAGEOUT, POPULATE, COLLAPSE = 4, 8, 14, 15, 21, 23, 25
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
UFFDIO_WRITEPROTECT, UFFDIO_POISON = 0xC018AA06, 0xC020AA08
UFFD_API, UFFD_MISSING, UFFD_WP = 0xAA, 1, 2
# PAGEFAULT_FLAG_WP, MISSING_SHMEM, WP_HUGETLBFS_SHMEM, POISON
UFFD_FEATURES = 1 << 0 | 1 << 5 | 1 << 12 | 1 << 14
# What the model forgets to expect is SIGBUS then, not a wait in the kernel that no signal ends.
UFFD_USER_MODE_ONLY = 1
SYS_USERFAULTFD = 323
PR_SET_PDEATHSIG = 1
PR_SET_THP_DISABLE, PR_THP_DISABLE_EXCEPT_ADVISED = 41, 2
SECONDS = 15
TELL_AGAIN = 400  # looks of half a millisecond


class HostError(Exception):
    """The kernel let a layout's process die or hang."""


libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for _name in ("madvise", "mprotect"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for _name in ("mlock", "munlock", "munmap"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
libc.vmsplice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]


def _checked(result: int | None) -> int:
    if result in (-1, ctypes.c_size_t(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result or 0


class Host:
    """Where layouts are realised: a process that forks.

    trace: the folder of a tracefs instance in which the huge_memory events are on.
    held: what all its processes keep open, so that nothing is put back before they are gone.
    """

    def __init__(self, trace: Path, held: int) -> None:
        serve = f"import sys; from {__name__} import serve; serve(sys.argv[1])"
        command = [sys.executable, "-P", "-c", serve, str(trace)]
        # Its own arrays are nothing for khugepaged.
        environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=[held],
        )

    def run(self, layout: Layout) -> Outcome:
        """What the kernel makes of a layout. Raises: HostError."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{layout}\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline() or '{"died": "the server of layouts"}')
        if "died" in answer:
            raise HostError(f"{layout}: {answer['died']}")
        return Outcome(**answer)

    def close(self) -> None:
        """End it."""
        self._server.communicate()


def serve(trace: str) -> None:
    """Answer each layout that comes in with what became of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sitter = _sit()
    for line in sys.stdin:
        print(_one(line.strip(), Path(trace)), flush=True)
    os.kill(sitter, signal.SIGKILL)


def _sit() -> int:
    """A process that khugepaged has registered: without any it would not come round."""
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        private = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        _checked(libc.mmap(PROBE, BLOCK, 3, private, -1, 0))
        _checked(libc.madvise(PROBE, BLOCK, HUGEPAGE))
        ctypes.memset(PROBE, 1, 1)
        _checked(libc.munmap(PROBE, BLOCK))
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(writes, b"x")
        while True:
            signal.pause()
    os.read(reads, 1)
    return pid


def _one(text: str, trace: Path) -> str:
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os.close(reads)
        try:
            said = json.dumps(observe(_Kernel(parse(text), trace)).as_json())
        except BaseException as error:  # it is told to whoever asked
            said = json.dumps({"died": repr(error)})
        with os.fdopen(writes, "w") as out:
            out.write(said)
        os._exit(0)
    os.close(writes)
    chunks, deadline = [], time.monotonic() + SECONDS
    while select.select([reads], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reads, 1 << 20)
        if not chunk:
            break
        chunks.append(chunk)
    else:
        chunks = [json.dumps({"died": f"not done after {SECONDS} s"}).encode()]
    os.close(reads)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not chunks:
        return json.dumps({"died": f"by signal {os.WTERMSIG(status)}"})
    return b"".join(chunks).decode()


class _Kernel:
    """The process itself with the layout's memory mapped, and its children."""

    def __init__(self, layout: Layout, trace: Path) -> None:
        self.layout = layout
        self.trace = trace
        self.children: list[_Child] = []
        self.uffd: int | None = None
        self.pipes: list[tuple[int, int]] = []
        self.file: int | None = None
        self.mms: dict[str, str] = {}
        for name in ("none", "swap", "shared"):
            (THP / f"khugepaged/max_ptes_{name}").write_text(str(getattr(layout, name)))
        # From one state always: `force` needs `inherit`, and leaves the mount's policy alone.
        _choose("hugepages-2048kB/shmem_enabled", "inherit")
        _choose("shmem_enabled", "advise")
        self.knobs = {knob: _choose(knob, word) for knob, word in layout.knobs().items()}
        private = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        self._mmap(PROBE, 2 * BLOCK, private, -1, 0)
        ctypes.string_at(PROBE, 1)
        self._zero = self._frame(PROBE)
        ctypes.memset(PROBE, 1, 1)
        self._map()
        self._introduce("main", os.getpid(), lambda: _collapse(PROBE + BLOCK, BLOCK))

    def _mmap(
        self, addr: int, length: int, flags: int, fd: int, offset: int, prot: int = 3
    ) -> None:
        _checked(libc.mmap(addr, length, prot, flags, fd, offset))

    def _map(self) -> None:
        layout, addr = self.layout, BASE + self.layout.head * PAGE
        shared = MAP_PRIVATE if layout.memory in ("anon", "private") else MAP_SHARED
        flags = shared | MAP_FIXED_NOREPLACE
        if not layout.has_file:
            self._mmap(addr, layout.nr * PAGE, flags | MAP_ANONYMOUS, -1, 0)
            return
        self.file = os.memfd_create("layout")
        os.ftruncate(self.file, (layout.offset + layout.blocks * NR) * PAGE)
        offset = (layout.offset + layout.head) * PAGE
        self._mmap(addr, layout.nr * PAGE, flags, self.file, offset)

    def _introduce(self, who: str, pid: int, collapse: Callable[[], int]) -> None:
        """Learn the hashed pointer of a process's mm from an event that it causes."""
        self.clear_events()
        collapse()
        for line in (self.trace / "trace").read_text().splitlines():
            if f"-{pid} " in line and "mm_khugepaged_scan_pmd: mm=" in line:
                self.mms[line.split("mm=")[1].split(",")[0]] = who

    def stroke(self, stroke: Stroke) -> int:
        name = stroke.name
        if name.startswith("child."):
            if not self.children:
                return errno.ESRCH
            plain = stroke._replace(name=name.removeprefix("child."))
            return self.children[-1].ask(plain)
        return self.do(stroke, "main")

    def do(self, stroke: Stroke, who: str) -> int:
        """In this process."""
        try:
            getattr(self, "_" + stroke.name.replace("-", "_"))(stroke, who)
        except OSError as error:
            return error.errno or 0
        return 0

    def _each(self, stroke: Stroke, call: Callable[[int, int], int]) -> None:
        for first, nr in runs(stroke):
            _checked(call(BASE + first * PAGE, nr * PAGE))

    def _advise(self, stroke: Stroke, advice: int) -> None:
        self._each(stroke, lambda addr, length: libc.madvise(addr, length, advice))

    def _write(self, stroke: Stroke, who: str) -> None:
        for first, nr in runs(stroke):
            data = b"".join(contents(range(first, first + nr), who))
            ctypes.memmove(BASE + first * PAGE, data, len(data))

    def _read(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002 (all read alike)
        for page in stroke.pages():
            ctypes.string_at(BASE + page * PAGE, 1)

    def _dontneed(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke, DONTNEED)

    def _free(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke, FREE)

    def _pageout(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke, PAGEOUT)

    def _hugepage(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke._replace(step=1), HUGEPAGE)

    def _nohugepage(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke._replace(step=1), NOHUGEPAGE)

    def _collapse(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke._replace(step=1), COLLAPSE)

    def _populate(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._advise(stroke._replace(step=1), POPULATE)

    def _thp_disable(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        flags = PR_THP_DISABLE_EXCEPT_ADVISED if stroke.first == 2 else 0
        _checked(libc.prctl(PR_SET_THP_DISABLE, int(stroke.first > 0), flags, 0, 0))

    def _mprotect(self, stroke: Stroke, prot: int) -> None:
        self._each(stroke._replace(step=1), lambda addr, nr: libc.mprotect(addr, nr, prot))

    def _protect(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._mprotect(stroke, PROT_READ)

    def _unprotect(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._mprotect(stroke, PROT_READ | PROT_WRITE)

    def _mlock(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._each(stroke._replace(step=1), libc.mlock)

    def _munlock(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._each(stroke._replace(step=1), libc.munlock)

    def _munmap(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._each(stroke._replace(step=1), libc.munmap)

    def _move(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        old, length, new = BASE + stroke.first * PAGE, stroke.nr * PAGE, BASE + stroke.to * PAGE
        _checked(libc.mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, new))

    def _pin(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        for page in stroke.pages():
            pipe = os.pipe()
            self.pipes.append(pipe)
            vector = (ctypes.c_size_t * 2)(BASE + page * PAGE, PAGE)
            _checked(libc.vmsplice(pipe[1], vector, 1, 0))

    def _fork(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        name = f"child {len(self.children) + 1}"
        child = _Child(self, name)
        self.children.append(child)
        self._introduce(name, child.pid, lambda: child.ask(Stroke("introduce")))

    def _userfaultfd(self) -> int:
        if self.uffd is None:
            flags = os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
            self.uffd = _checked(libc.syscall(SYS_USERFAULTFD, flags))
            fcntl.ioctl(self.uffd, UFFDIO_API, struct.pack("QQQ", UFFD_API, UFFD_FEATURES, 0))
        return self.uffd

    def _uffd_ioctl(self, stroke: Stroke, request: int, *rest: int) -> None:
        place = BASE + stroke.first * PAGE, stroke.nr * PAGE
        fcntl.ioctl(self._userfaultfd(), request, struct.pack("Q" * (2 + len(rest)), *place, *rest))

    def _arm(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._uffd_ioctl(stroke, UFFDIO_REGISTER, UFFD_MISSING, 0)

    def _uffd_wp(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._uffd_ioctl(stroke, UFFDIO_REGISTER, UFFD_WP, 0)
        self._uffd_ioctl(stroke, UFFDIO_WRITEPROTECT, 1)

    def _uffd_poison(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._uffd_ioctl(stroke, UFFDIO_REGISTER, UFFD_MISSING, 0)
        self._uffd_ioctl(stroke, UFFDIO_POISON, 0, 0)

    def _introduce_self(self) -> None:
        _collapse(PROBE + BLOCK, BLOCK)

    def _fd(self) -> int:
        assert self.file is not None
        return self.file

    def _pwrite(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        for first, nr in runs(stroke):
            data = b"".join(contents(range(first, first + nr), "file"))
            os.pwrite(self._fd(), data, (self.layout.offset + first) * PAGE)

    def _allocate(self, stroke: Stroke, mode: int) -> None:
        for first, nr in runs(stroke):
            offset = (self.layout.offset + first) * PAGE
            _checked(libc.fallocate(self._fd(), mode, offset, nr * PAGE))

    def _fallocate(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._allocate(stroke, 0)

    def _punch(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._allocate(stroke, KEEP_SIZE | PUNCH_HOLE)

    def _truncate(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        os.ftruncate(self._fd(), (self.layout.offset + stroke.first) * PAGE)

    def _alias(self, stroke: Stroke, who: str) -> None:  # noqa: ARG002
        self._map_again(ALIAS, self.layout.offset + stroke.first)

    def _map_again(self, addr: int, first: int) -> None:
        nr = self.layout.offset + self.layout.blocks * NR - first
        if not nr:
            raise OSError(errno.EINVAL, "nothing is left of the file")
        self._mmap(addr, nr * PAGE, MAP_SHARED | MAP_FIXED, self._fd(), first * PAGE, PROT_READ)
        cached = ctypes.create_string_buffer(nr)
        size = max(0, os.fstat(self._fd()).st_size // PAGE - first)
        _checked(libc.mincore(addr, nr * PAGE, cached))
        for page in range(min(nr, size)):
            if cached.raw[page] & 1:
                ctypes.string_at(addr + page * PAGE, 1)

    def collapse(self) -> int:
        return _collapse(BASE + self.layout.head * PAGE, self.layout.nr * PAGE)

    def khugepaged(self) -> int:
        """Writing the sleep wakes the daemon, for one scan of all that is registered.

        On its way to sleep it would miss that; so it is told again if nothing comes of it.
        """
        if "never" in (self.layout.enabled, self.layout.size) and not _khugepaged_runs():
            return 0
        before, scans = _khugepaged("pages_collapsed"), _khugepaged("full_scans")
        deadline = time.monotonic() + SECONDS / 2
        for turn in count():
            if turn % TELL_AGAIN == 0:
                (THP / "khugepaged/scan_sleep_millisecs").write_text(str(KHUGEPAGED_SLEEPS))
            if _khugepaged("full_scans") != scans:
                return _khugepaged("pages_collapsed") - before
            if time.monotonic() > deadline:
                raise TimeoutError("khugepaged did not come round")
            time.sleep(0.0005)
        raise AssertionError

    def people(self) -> list[str]:
        return ["main", *(child.name for child in self.children)]

    def _pid(self, who: str) -> int:
        return next((child.pid for child in self.children if child.name == who), os.getpid())

    def pagemap(self, who: str, addr: int, nr: int) -> Words:
        with open(f"/proc/{self._pid(who)}/pagemap", "rb", buffering=0) as words:
            return np.frombuffer(os.pread(words.fileno(), nr * 8, addr // PAGE * 8), np.uint64)

    def _frame(self, addr: int) -> int:
        return int(self.pagemap("main", addr, 1)[0]) & (1 << 55) - 1

    def smaps(self, who: str) -> str:
        return Path(f"/proc/{self._pid(who)}/smaps").read_text()

    def vmstat(self) -> dict[str, int]:
        Path("/proc/sys/vm/stat_refresh").write_text("1")
        lines = Path("/proc/vmstat").read_text().splitlines()
        told = {name: int(value) for name, value in (line.split() for line in lines)}
        return {name: told[name] for name in COUNTERS}

    def zero_frame(self) -> int:
        return self._zero

    def unwatch(self) -> None:
        if self.uffd is not None:
            os.close(self.uffd)

    def page(self, who: str, page: int) -> bytes | None:
        with open(f"/proc/{self._pid(who)}/mem", "rb", buffering=0) as memory:
            try:
                return os.pread(memory.fileno(), PAGE, BASE + page * PAGE)
            except OSError:
                return None

    def file_bytes(self) -> bytes:
        size = (self.layout.offset + self.layout.blocks * NR) * PAGE
        return os.pread(self._fd(), size, 0)

    def clear_events(self) -> None:
        (self.trace / "trace").write_text("")

    def events(self) -> list[tuple[str, Event]]:
        return parse_events((self.trace / "trace").read_text(), self.mms)


class _Child:
    """A forked process that does what it is asked."""

    def __init__(self, parent: _Kernel, name: str) -> None:
        self.name = name
        here, there = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            with os.fdopen(here[0]) as asks, os.fdopen(there[1], "w") as answers:
                os.close(here[1])
                if parent.uffd is not None:
                    os.close(parent.uffd)  # a userfaultfd goes on while anybody has it
                for line in asks:
                    stroke = Stroke(*json.loads(line))
                    answers.write(f"{_in_child(parent, stroke, name)}\n")
                    answers.flush()
            os._exit(0)
        os.close(here[0])
        os.close(there[1])
        self._asks, self._answers = os.fdopen(here[1], "w"), os.fdopen(there[0])

    def ask(self, stroke: Stroke) -> int:
        """Have it done, and say the errno."""
        self._asks.write(json.dumps(stroke) + "\n")
        self._asks.flush()
        return int(self._answers.readline())


def _in_child(parent: _Kernel, stroke: Stroke, name: str) -> int:
    if stroke.name == "introduce":
        return _collapse(PROBE + BLOCK, BLOCK)
    return parent.do(stroke, name)


def _collapse(addr: int, length: int) -> int:
    return ctypes.get_errno() if libc.madvise(addr, length, COLLAPSE) else 0


def _choose(knob: str, word: str) -> int:
    """Turn a knob that is not so already: khugepaged may be stopped and started by it. Errno."""
    try:
        if f"[{word}]" not in (THP / knob).read_text():
            (THP / knob).write_text(word)
    except OSError as error:
        return error.errno or 0
    return 0


def _khugepaged_runs() -> bool:
    return any(comm.read_text() == "khugepaged\n" for comm in Path("/proc").glob("[0-9]*/comm"))


def _khugepaged(name: str) -> int:
    return int((THP / "khugepaged" / name).read_text())
