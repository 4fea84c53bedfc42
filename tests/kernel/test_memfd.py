"""Files of the model's shmem, held against memfds of the running kernel."""

import ctypes
import mmap
import os
from pathlib import Path

from collapse_kit import HPAGE, PAGE, block_bytes, small_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_kit import lacking

SIZE = 3 * HPAGE
offsets = st.one_of(
    st.integers(0, 12 * PAGE), st.integers(HPAGE - 3 * PAGE, HPAGE + 3 * PAGE), st.integers(0, SIZE)
)
lengths = st.one_of(st.integers(1, 3 * PAGE), st.integers(1, HPAGE))
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def host_has_small_shmem_pages() -> bool:
    """Whether a memfd of this kernel can be had, and is made of small pages."""
    small = not SHMEM_ENABLED.exists() or any(
        f"[{policy}]" in SHMEM_ENABLED.read_text() for policy in ("never", "deny", "advise")
    )
    return small and hasattr(os, "memfd_create")


class HostFile:
    """A memfd of the kernel that the tests run on."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("f")
        os.ftruncate(self.fd, SIZE)
        self.map = mmap.mmap(self.fd, SIZE)
        os.ftruncate(self.fd, 0)
        self.libc = ctypes.CDLL(None, use_errno=True)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        call = self.libc.fallocate
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        assert call(self.fd, mode, offset, length) == 0, os.strerror(ctypes.get_errno())

    def apply(self, name: str, where: int, length: int, data: bytes) -> None:
        """Do one operation. Stores and loads stay below the end of the file."""
        stop = min(where + length, os.fstat(self.fd).st_size, SIZE)
        if name == "pwrite":
            os.pwrite(self.fd, data, where)
        elif name == "punch":
            self.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, where, length)
        elif name in ("fallocate", "keep_size"):
            self.fallocate(FALLOC_FL_KEEP_SIZE * (name == "keep_size"), where, length)
        elif name == "truncate":
            os.ftruncate(self.fd, where)
        elif name == "store" and where < stop:
            self.map[where:stop] = data[: stop - where]
        elif name == "load" and where < stop:
            self.map[where:stop]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["pwrite", "punch", "fallocate", "keep_size", "truncate", "store", "load"]
            ),
            offsets,
            lengths,
        ),
        min_size=3,
        max_size=16,
    )
)
def test_random_use_of_a_file_is_that_of_a_memfd_of_the_host(
    steps: list[tuple[str, int, int]],
) -> None:
    """Byte for byte, and block for block."""
    if not host_has_small_shmem_pages():
        lacking("memfds of the host have huge pages")
    machine, host = small_machine("64M"), HostFile()
    process = machine.process("a")
    file = process.memfd_create("f")
    addr = process.mmap(SIZE, file=file, shared=True)
    for number, (name, where, length) in enumerate(steps):
        data = block_bytes(number * 7919, -(-length // PAGE))[:length]
        stop = min(where + length, file.inode.i_size, SIZE)
        host.apply(name, where, length, data)
        if name == "pwrite":
            process.pwrite(file, where, data)
        elif name == "truncate":
            process.ftruncate(file, where)
        elif name == "store" and where < stop:
            process.write(addr + where, data[: stop - where])
        elif name == "load" and where < stop:
            process.read(addr + where, stop - where)
        elif name in ("punch", "fallocate", "keep_size"):
            keep, punch = name == "keep_size", name == "punch"
            process.fallocate(file, where, length, keep_size=keep, punch_hole=punch)
        status = os.fstat(host.fd)
        assert (file.inode.i_size, file.inode.i_blocks) == (status.st_size, status.st_blocks)
        assert process.pread(file, 0, 2 * SIZE) == os.pread(host.fd, 2 * SIZE, 0)
    host.close()
    machine.audit()
