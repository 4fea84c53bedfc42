"""A fork while khugepaged has the pages isolated, and an munmap while it has dropped mmap_lock.

Tasks are put in each other's way at the very steps where the kernel could lose the CPU.
"""

from pykhuge import Advice, Machine, WouldBlock

HPAGE_PMD_SIZE = 2 << 20

machine = Machine("1G")
task = machine.process("app")
addr = task.mmap(HPAGE_PMD_SIZE)
task.write(addr, b"x" * HPAGE_PMD_SIZE)
task.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)

# While the collapse holds mmap_lock for write, a fork has to wait.
collapse = machine.spawn(machine.collapse.steps(task, addr), "khugepaged")
collapse.run_until("copied")
print("isolated:", machine.vmstat()["nr_isolated_anon"])
try:
    task.fork()
except WouldBlock as error:
    print("fork:", error)
machine.audit()
print("collapse:", collapse.finish().name)

# While it allocates, nobody is kept out: the mapping may be gone when it looks again.
task.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_DONTNEED)
task.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_NOHUGEPAGE)
task.write(addr, b"y" * HPAGE_PMD_SIZE)
task.madvise(addr, HPAGE_PMD_SIZE, Advice.MADV_HUGEPAGE)
collapse = machine.spawn(machine.collapse.steps(task, addr), "khugepaged")
collapse.run_until("acquire mmap_lock for write")
task.munmap(addr, HPAGE_PMD_SIZE)
print("collapse:", collapse.finish().name)
print(machine.trace.text().splitlines()[-1].partition(": ")[2])
machine.audit()
