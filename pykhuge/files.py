"""FileCalls: the system calls of a process that are about open files."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import Any, TypeVar

from pykhuge.kernel.sched import Steps, Task, steps
from pykhuge.mm.errors import check_int, os_error
from pykhuge.mm.file_table import (
    foresee_evictions,
    fput,
    get_file,
    hold_file,
    inode_locked,
    release_file,
)
from pykhuge.mm.filemap import file_page, foresee_truncation
from pykhuge.mm.mm_types import File, Mm, RegularInode, ShmemInode, ShmemSuperBlock
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import PG_private
from pykhuge.mm.read_write import vfs_read, vfs_write
from pykhuge.mm.regular_file import do_dentry_open, fsync, regular_truncate
from pykhuge.mm.shmem import (
    shmem_evict_inode,
    shmem_fallocate,
    shmem_file_setup,
    shmem_new_inode,
    shmem_truncate,
    shmem_undo_range,
)

__all__ = ["FileCalls"]

T = TypeVar("T")

MAX_RW_COUNT = 0x7FFFF000
MFD_NAME_MAX = 249
_OPEN_FLAGS = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


class FileCalls:
    """What `Process` can do with files. An open file is a `File`, until it is closed."""

    mem: Memory
    mm: Mm
    task: Task[Any]

    def check_alive(self) -> None:
        """Raises: KernelPanic if the host is dead, OSError ESRCH if the process is."""
        raise NotImplementedError

    @steps
    def open(
        self, path: str, flags: int = os.O_RDONLY, *, tmpfs: ShmemSuperBlock | None = None
    ) -> Steps[File]:
        """open(2) of a file of the host, or of file `path` of a tmpfs mount of the model.

        A file of the host is read through the model's page cache. Opened for writing, it is really
        written, by fsync and by writeback.

        Args:
            flags: O_RDONLY, O_WRONLY or O_RDWR, with O_CREAT, O_TRUNC.
        Raises: OSError, among others ENOENT; EINVAL for other flags or what is no regular file.
        """
        check_int(flags=flags)
        if flags & ~_OPEN_FLAGS:
            raise os_error(
                errno.EINVAL,
                f"flags={flags:#o}: allowed O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_TRUNC",
            )
        readable = flags & os.O_ACCMODE != os.O_WRONLY
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        create = bool(flags & os.O_CREAT)
        if tmpfs is not None and tmpfs not in self.mem.mounts:
            raise ValueError("tmpfs: allowed a mount of this machine, from Machine.tmpfs")
        if tmpfs is not None:
            file = self._open_tmpfs(tmpfs, path, readable, writable, create)
        else:
            file = yield from do_dentry_open(
                self.mem, path, readable=readable, writable=writable, create=create
            )
        self.mm.files.append(file)
        if flags & os.O_TRUNC and writable:
            try:
                yield from inode_locked(self.mem, file.inode, self._truncate(file, 0))
            except GeneratorExit:
                # A plain call that would have to wait is given up: nobody has the descriptor.
                self.mem.sched.current.run(self.close.steps(file))
                raise
        return file

    def _open_tmpfs(
        self, tmpfs: ShmemSuperBlock, name: str, readable: bool, writable: bool, create: bool
    ) -> File:
        inode = tmpfs.names.get(name)
        if inode is None:
            if not create:
                raise os_error(errno.ENOENT, name)
            inode = tmpfs.names[name] = shmem_new_inode(self.mem, tmpfs, name)
        inode.i_count += 1
        return File(inode, readable, writable, self.mem.ra_pages)

    @steps
    def unlink(self, name: str, *, tmpfs: ShmemSuperBlock) -> Steps[None]:
        """unlink(2): the name goes, and with it the file if nobody has it open or mapped."""
        inode = tmpfs.names.get(name)
        if inode is None:
            raise os_error(errno.ENOENT, name)
        if not inode.i_count:
            yield from foresee_truncation(self.mem, inode.i_mapping, 0, 1 << 52)
        del tmpfs.names[name]
        inode.i_nlink = 0
        if not inode.i_count:
            yield from shmem_evict_inode(self.mem, inode)

    def memfd_create(self, name: str) -> File:
        """memfd_create(2): an empty shmem file without a name, open for reading and writing.

        Other processes have it by `fork` after this call, or by `receive`.
        Raises: OSError EINVAL for a name of more than 249 bytes or with a NUL.
        """
        self.check_alive()
        if len(name.encode()) > MFD_NAME_MAX or "\0" in name:
            raise os_error(errno.EINVAL, f"name={name!r}: allowed up to {MFD_NAME_MAX} bytes")
        file = shmem_file_setup(self.mem, f"memfd:{name}", 0)
        self.mm.files.append(file)
        return file

    def receive(self, file: File) -> File:
        """Have a file that another process has open, as sent over a socket (SCM_RIGHTS)."""
        self.check_alive()
        if not any(file in mm.files for mm in self.mem.mms):
            raise os_error(errno.EBADF, f"{file!r} is not open in any process of this machine")
        self.mm.files.append(get_file(file))
        return file

    @steps
    def close(self, file: File) -> Steps[None]:
        """close(2). What is mapped stays mapped. Raises: OSError EBADF."""
        self._check_open(file)
        yield from foresee_evictions(self.mem, Counter([file]))
        self.mm.files.remove(file)
        yield from fput(self.mem, file)

    @steps
    def pread(self, file: File, offset: int, length: int) -> Steps[bytes]:
        """pread(2): up to `length` bytes; fewer at the end of the file, or beyond 2 GiB.

        Raises: OSError EBADF, EINVAL, EIO; KernelPanic if a poisoned line is read: the kernel's
        copy to user space is not machine-check safe.
        """
        self._check_open(file)
        if not file.readable:
            raise os_error(errno.EBADF, f"{file.inode.name} is not open for reading")
        _check_offset("offset", offset)
        _check_offset("length", length)
        return self._held(
            file, vfs_read(self.mem, self.mm, file, offset, min(length, MAX_RW_COUNT))
        )

    @steps
    def pwrite(self, file: File, offset: int, data: bytes) -> Steps[int]:
        """pwrite(2): returns how many bytes were written; fewer where space ran out on the way.

        Raises: OSError EBADF, EINVAL, ENOSPC, EIO; OutOfMemory.
        """
        self._check_open(file, writable=True)
        _check_offset("offset", offset)
        return self._changing(file, vfs_write(self.mem, self.mm, file, offset, data))

    @steps
    def ftruncate(self, file: File, length: int) -> Steps[None]:
        """ftruncate(2): the file ends at `length`; what was behind is gone from everywhere."""
        self._check_open(file, writable=True)
        _check_offset("length", length)
        return self._changing(file, self._truncate(file, length))

    def _truncate(self, file: File, length: int) -> Steps[None]:
        if isinstance(file.inode, ShmemInode):
            return shmem_truncate(self.mem, file.inode, length)
        assert isinstance(file.inode, RegularInode)
        return regular_truncate(self.mem, file.inode, length)

    @steps
    def fallocate(
        self,
        file: File,
        offset: int,
        length: int,
        *,
        keep_size: bool = False,
        punch_hole: bool = False,
    ) -> Steps[None]:
        """fallocate(2) of a shmem file: preallocate a range, or punch a hole, which keeps the size.

        Raises: OSError EBADF, EINVAL, ENOSPC, EOPNOTSUPP for a file of the host; OutOfMemory.
        """
        self._check_open(file, writable=True)
        _check_offset("offset", offset)
        check_int(length=length)
        if length <= 0:
            raise os_error(errno.EINVAL, f"length={length}: allowed 1 and more")
        inode, end = file.inode, offset + length
        if not isinstance(inode, ShmemInode):
            raise os_error(errno.EOPNOTSUPP, f"{inode.name}: allowed for shmem files")
        if punch_hole:
            punch = shmem_undo_range(self.mem, inode, offset, end, even_cows=False)
            return self._changing(file, punch)
        memcg, nid = self.mm.memcg, self.mm.preferred_node
        return self._changing(
            file,
            shmem_fallocate(
                self.mem, inode, offset, end, keep_size=keep_size, memcg=memcg, nid=nid
            ),
        )

    @steps
    def fsync(self, file: File) -> Steps[None]:
        """fsync(2): dirty pages of a file of the host are written there; shmem has nowhere to go.

        Raises: OSError EBADF, EIO if a page could not be written.
        """
        self._check_open(file)
        if isinstance(file.inode, RegularInode):
            yield from self._held(file, fsync(self.mem, file))

    def attach_private(self, file: File, index: int, *, releasable: bool = True) -> None:
        """Let the file system keep data of its own (buffer heads) with cached page `index`.

        releasable: False makes filemap_release_folio fail, as a journal that still needs it does.
        Raises: ValueError if no small page of a file of the host is cached there.
        """
        self._check_open(file)
        entry = file.f_mapping.i_pages.load(index)
        if entry <= 0 or file.f_mapping.i_pages.order(index) or isinstance(file.inode, ShmemInode):
            raise ValueError(f"index={index}: allowed where a small page of a disk file is cached")
        if not self.mem.pages.flags[entry] & PG_private:
            self.mem.pages.flags[entry] |= PG_private
            self.mem.pages.refcount[entry] += 1
        self.mem.pages.private[entry] = not releasable

    def cached_pfn(self, file: File, index: int) -> int | None:
        """The frame that caches page `index` of the file; None if none does (mincore)."""
        entry = file.f_mapping.i_pages.load(index)
        if entry <= 0:
            return None
        return file_page(self.mem, entry, index)

    def _changing(self, file: File, call: Steps[T]) -> Steps[T]:
        """`call`, which changes contents or size of the file, with the inode locked."""
        return self._held(file, inode_locked(self.mem, file.inode, call))

    def _held(self, file: File, call: Steps[T]) -> Steps[T]:
        """`call` with a reference to `file`, which another thread may close meanwhile (fdget)."""
        self._check_open(file)
        hold_file(self.mem, file)
        try:
            result = yield from call
        except GeneratorExit:
            # A plain call that would have to wait is given up.
            self.mem.sched.current.run(release_file(self.mem, file))
            raise
        except BaseException:
            if self.mem.panic is None:
                yield from release_file(self.mem, file)
            raise
        yield from release_file(self.mem, file)
        return result

    def _check_open(self, file: File, *, writable: bool = False) -> None:
        self.check_alive()
        if not isinstance(file, File):
            raise TypeError(f"file={file!r}: allowed a File, from open or memfd_create")
        if file not in self.mm.files:
            raise os_error(errno.EBADF, f"{file.inode.name} is not open here")
        if writable and not file.writable:
            raise os_error(errno.EBADF, f"{file.inode.name} is not open for writing")


def _check_offset(name: str, value: int) -> None:
    check_int(**{name: value})
    if not 0 <= value < 1 << 63:
        raise os_error(errno.EINVAL, f"{name}={value}: allowed 0..{(1 << 63) - 1}")
