"""A file is opened for writing while khugepaged collapses its pages: one of the two gives way.

A disk file with a huge page must not be written to. The collapse counts the huge page in nr_thps
and then looks for writers; the open counts its writer in i_writecount and then looks for huge
pages. Whoever is later to look sees the other.
"""

import os
import tempfile
from pathlib import Path

from pykhuge import PROT_EXEC, PROT_READ, Advice, File, Machine, Process

HPAGE_PMD_SIZE = 2 << 20


def text_of(path: Path) -> tuple[Machine, Process, File, int]:
    """A program's text, all of it read in through its mapping; last of all where it is mapped."""
    machine = Machine("1G")
    machine.thp.enabled = "always"
    app = machine.process("app")
    file = app.open(str(path))
    addr = app.mmap(HPAGE_PMD_SIZE, file=file, prot=PROT_READ | PROT_EXEC)
    app.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_POPULATE_READ)
    return machine, app, file, addr


def show(when: str, file: File) -> None:
    mapping = file.f_mapping
    writers = file.inode.i_writecount
    print(f"{when}: nr_thps={mapping.nr_thps} i_writecount={writers} nrpages={mapping.nrpages}")


with tempfile.TemporaryDirectory() as directory:
    program = Path(directory) / "program"
    program.write_bytes(b"text" * (HPAGE_PMD_SIZE // 4))

    print("Both have counted, the collapse looks first: it sees the writer and takes it all back.")
    machine, app, file, addr = text_of(program)
    collapse = machine.spawn(machine.collapse.steps(app, addr), "khugepaged")
    collapse.run_until("nr_thps")
    show("before the look at i_writecount", file)
    editor = machine.process("editor")
    opening = machine.spawn(editor.open.steps(str(program), os.O_RDWR), "editor")
    opening.run_until("i_writecount")
    show("before the look at nr_thps", file)
    print("collapse:", collapse.finish().name)
    opening.finish()
    show("open for writing", file)
    print(machine.trace.text().splitlines()[-2].partition(": ")[2])
    machine.audit()

    print("The collapse has ended before: the open finds the huge page and empties the cache.")
    machine, app, file, addr = text_of(program)
    print("collapse:", machine.collapse(app, addr).name)
    show("collapsed", file)
    machine.process("editor").open(str(program), os.O_RDWR)
    show("open for writing", file)
    print("the bytes:", app.pread(file, 0, 8), "nr_file_hugepages:", end=" ")
    print(machine.vmstat()["nr_file_hugepages"])
    machine.audit()
