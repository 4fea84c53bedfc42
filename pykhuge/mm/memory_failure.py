"""What the kernel does about a page that has gone bad (mm/memory-failure.c).

`memory_failure` takes the page away from everybody: entries that map it become hwpoison entries,
whose next user gets SIGBUS; a clean page of a disk file is only forgotten, to be read again. The
page itself is kept by one reference that nobody drops (`Memory.hwpoison.refs`), so that it is never
allocated again. Injected failures run the same code without any machine check.

Results are errno numbers, 0 for a page that was dealt with, as callers ask for the number.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pykhuge.hw.memory import HPAGE_PMD_NR, PAGE_SHIFT
from pykhuge.kernel.errseq import errseq_set
from pykhuge.kernel.locking import READ, RwSem
from pykhuge.kernel.sched import Acquire, Foresee, Release, Steps
from pykhuge.mm.errors import BUS_MCEERR_AO, BUS_MCEERR_AR, EHWPOISON, Signal
from pykhuge.mm.filemap import (
    filemap_release_pages,
    filemap_remove_pages,
    split_file_page,
    wait_on_page,
    wait_on_page_writeback,
)
from pykhuge.mm.huge_memory import split_huge_page
from pykhuge.mm.mm_types import VM_SHARED, AddressSpace, AnonVma, Mm, RegularInode, ShmemInode, Vma
from pykhuge.mm.mmzone import Memory
from pykhuge.mm.page import (
    PG_active,
    PG_anon,
    PG_dirty,
    PG_error,
    PG_has_hwpoisoned,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_reserved,
    PG_swapbacked,
    PG_swapcache,
    PG_table,
    PG_unevictable,
    PG_uptodate,
    PG_writeback,
)
from pykhuge.mm.page_alloc import put_page_back_buddy, take_page_off_buddy, uncharge
from pykhuge.mm.page_table import (
    PAGE_DIRTY,
    PAGE_PRESENT,
    PAGE_RW,
    SWP_HWPOISON,
    is_swap_pte,
    make_swap_pte,
    pmd_trans_huge,
    pte_pfn,
    swp_offset,
    swp_type,
)
from pykhuge.mm.page_writeback import set_page_dirty
from pykhuge.mm.rmap import (
    Mapping,
    leave_markers,
    mm_counter,
    page_mappings,
    page_mkclean,
    page_remove_rmap,
    pmd_of,
)
from pykhuge.mm.swap import del_pages_from_lru, lru_add_drain_all, put_pages
from pykhuge.mm.swap_state import delete_from_swap_cache, unmap_to_swap

__all__ = [
    "get_hwpoison_page",
    "memory_failure",
    "memory_failure_queue",
    "memory_failure_work",
    "try_to_split_thp_page",
    "unpoison_memory",
    "will_be_handled",
]

# enum mf_result, as the log has them.
IGNORED, FAILED, DELAYED, RECOVERED = "Ignored", "Failed", "Delayed", "Recovered"


def memory_failure(
    mem: Memory,
    pfn: int,
    *,
    current: Mm | None = None,
    count_increased: bool = False,
    sw_simulated: bool = False,
) -> Steps[int]:
    """Deal with frame `pfn`, which is bad.

    Args:
        current: whose access has met it (MF_ACTION_REQUIRED): the signal it must get is put into
            its `Mm.signals`. None: somebody else has found it.
        count_increased: the caller has a reference to the page, which goes over to this call.
        sw_simulated: injected; pages can be unpoisoned as long as all were.
    Returns: 0, EBUSY (nothing could be done), EHWPOISON (known already, or in a huge page that
    cannot be split), ENXIO (device memory), EFAULT (known, and `current` does not map it).
    Raises: KernelPanic with `memory_failure_recovery` 0.
    Locks: waits for the page lock; takes the anon_vma's lock or i_mmap_rwsem.
    """
    if not mem.hwpoison.recovery:
        raise mem.die(f"Memory failure on page {pfn:x}")
    yield Foresee(
        f"page {mem.pages.head_of(pfn):#x} is unlocked, and its mappings",
        lambda: not _would_wait(mem, pfn, count_increased=count_increased),
    )
    mem.hwpoison.hw_memory_failure |= not sw_simulated
    pages = mem.pages
    if pfn >= mem.device_start:
        _put_if(mem, pfn, count_increased)
        mem.hwpoison.device += 1
        _action_result(mem, pfn, "dax page", FAILED)
        return errno.ENXIO
    if pages.flags[pfn] & PG_hwpoison:
        return _known_poison(mem, pfn, current, held=count_increased)
    if not count_increased:
        if take_page_off_buddy(mem, pfn):
            mem.hwpoison.refs.add(pfn)
            return _action_result(mem, pfn, "free buddy page", RECOVERED)
        pages.flags[pfn] |= np.uint32(PG_hwpoison)
        if not get_hwpoison_page(mem, pfn):
            _log(mem, pfn, "unhandlable page.")
            kind = "get hwpoison page" if mem.version.action_result_says_more else "unknown page"
            return _action_result(mem, pfn, kind, IGNORED)
    pages.flags[pfn] |= np.uint32(PG_hwpoison)
    if pages.is_compound(pfn):
        pages.flags[pages.head_of(pfn)] |= np.uint32(PG_has_hwpoisoned)
        if not (yield from try_to_split_thp_page(mem, pfn)):
            return (yield from _unsplit(mem, pfn, current))
    mem.hwpoison.refs.add(pfn)
    lru_add_drain_all(mem)
    yield from wait_on_page(mem, pfn)
    return (yield from _handle_page(mem, pfn, current))


def _would_wait(mem: Memory, pfn: int, *, count_increased: bool) -> bool:
    """Whether page lock or rmap lock, both needed of a page that can be dealt with, are taken.

    To be asked before anything changes.
    """
    head = mem.pages.head_of(pfn)
    known = mem.pages.flags[pfn] & PG_hwpoison
    if known or not (count_increased or will_be_handled(mem, head)):
        return False
    lock = _rmap_lock(mem, head)
    return bool(mem.pages.flags[head] & PG_locked) or not (lock is None or lock.available(READ))


def _known_poison(mem: Memory, pfn: int, current: Mm | None, *, held: bool) -> int:
    """Nothing is left to be done, but to send `current` off again if it has come back."""
    says_more = mem.version.action_result_says_more
    once = says_more and mem.version.known_poison_counts_once
    if not once:
        _log(mem, pfn, "already hardware poisoned")
    found = EHWPOISON if current is None else _kill_accessing_process(mem, current, pfn)
    _put_if(mem, pfn, held)
    if once:
        _log_result(mem, pfn, "already poisoned page", FAILED)
    elif says_more:
        _action_result(mem, pfn, "already poisoned", FAILED)
        mem.hwpoison.again += 1
    return found


def _put_if(mem: Memory, pfn: int, held: bool) -> None:
    if held:
        put_pages(mem, np.array([pfn]))


def will_be_handled(mem: Memory, head: int) -> bool:
    """HWPoisonHandlable(): on an LRU list, or on its way there; who has isolated it has it alone.

    Such pages are given up before anybody asks for their lock.
    """
    waiting = any(head in batch for batch in mem.lru_batches)
    return waiting or bool(mem.pages.flags[head] & PG_lru)


def get_hwpoison_page(mem: Memory, pfn: int) -> bool:
    """get_any_page(): a reference to the page, if it is of a kind that can be dealt with (LRU)."""
    head = mem.pages.head_of(pfn)
    if not mem.pages.flags[head] & PG_lru:
        lru_add_drain_all(mem)
    if not mem.pages.flags[head] & PG_lru:
        return False
    mem.pages.refcount[head] += 1
    return True


def try_to_split_thp_page(mem: Memory, pfn: int) -> Steps[bool]:
    """Split the huge page around `pfn`; the caller's reference goes over to that very page.

    If somebody else refers to it, it stays, and so does the reference, which is to the whole.
    """
    head = mem.pages.head_of(pfn)
    yield from wait_on_page(mem, head)
    mapping = mem.mappings.get(int(mem.pages.mapping[head]))
    if isinstance(mapping, AddressSpace):
        split = split_file_page(mem, mapping, head, pinned=pfn)
    else:
        split = split_huge_page(mem, head, pinned=pfn)
    return split


def _unsplit(mem: Memory, pfn: int, current: Mm | None) -> Steps[int]:
    """The page cannot be taken out of its huge page: somebody holds that."""
    head = mem.pages.head_of(pfn)
    if not mem.version.unsplit_thp_kills:
        put_pages(mem, np.array([head]))
        return _action_result(mem, pfn, "unsplit thp", IGNORED)
    yield from _kill_procs_now(mem, pfn, current)
    put_pages(mem, np.array([head]))
    _action_result(mem, pfn, "unsplit thp", FAILED)
    return EHWPOISON


def _handle_page(mem: Memory, pfn: int, current: Mm | None) -> Steps[int]:
    """The page is small, referenced and not locked: unmap it, and do what its kind wants."""
    flags = int(mem.pages.flags[pfn])
    if flags & (PG_lru | PG_writeback):
        wait_on_page_writeback(mem, np.array([pfn]))
        yield from _hwpoison_user_mappings(mem, pfn, current)
        flags = int(mem.pages.flags[pfn])
        torn_down = flags & PG_lru and not flags & PG_swapcache and not mem.pages.mapping[pfn]
        if torn_down:
            return _action_result(mem, pfn, "already truncated LRU page", IGNORED)
    return _page_action(mem, pfn, flags)


# From the page to those who map it.


class ToKill(NamedTuple):
    """struct to_kill: who may have to be told, and where the page lies there.

    size_shift: of all that is lost, as siginfo has it.
    """

    mm: Mm
    addr: int
    size_shift: int = PAGE_SHIFT


def _kill_procs_now(mem: Memory, pfn: int, current: Mm | None) -> Steps[None]:
    """Signal whom a page concerns that stays where it is; the huge zero page has no rmap."""
    head = mem.pages.head_of(pfn)
    mapping, lock = mem.mappings.get(int(mem.pages.mapping[head])), _rmap_lock(mem, head)
    if mapping is None or lock is None:
        return
    yield Acquire(lock, READ)
    to_kill = _collect_procs(mem, pfn, mapping, current)
    yield Release(lock)
    for victim in to_kill:
        _kill_proc(mem, victim, pfn, current)


def _rmap_lock(mem: Memory, pfn: int) -> RwSem | None:
    mapping = mem.mappings.get(int(mem.pages.mapping[pfn]))
    if isinstance(mapping, AddressSpace):
        return mapping.i_mmap_rwsem
    return mapping.lock if mapping is not None else None


def _hwpoison_user_mappings(mem: Memory, pfn: int, current: Mm | None) -> Steps[None]:
    """Take the page out of every page table, and signal whom it concerns if its data are lost."""
    pages = mem.pages
    if not pages.mapcount[pfn]:
        return
    hwpoison = True  # TTU_HWPOISON
    mapping = mem.mappings[int(pages.mapping[pfn])]
    if pages.flags[pfn] & PG_swapcache:
        _log(mem, pfn, "keeping poisoned page in swap cache")
        hwpoison = False
    writes_back = isinstance(mapping, AddressSpace) and isinstance(mapping.host, RegularInode)
    if writes_back and not pages.flags[pfn] & PG_dirty:
        if _mkclean(mem, pfn):
            set_page_dirty(mem, np.array([pfn]))
        else:
            hwpoison = False
            _log(mem, pfn, "corrupted page was clean: dropped without side effects")
    lock = _rmap_lock(mem, pfn)
    assert lock is not None
    yield Acquire(lock, READ)
    to_kill = _collect_procs(mem, pfn, mapping, current)
    for each in list(page_mappings(mem, pfn)):
        _unmap(mem, each, pfn, hwpoison=hwpoison)
    yield Release(lock)
    lru_add_drain_all(mem)
    if pages.flags[pfn] & PG_dirty:
        for victim in to_kill:
            _kill_proc(mem, victim, pfn, current)


def _mkclean(mem: Memory, pfn: int) -> bool:
    """page_mkclean(); whether any entry was dirty or writable."""
    unclean = any(
        mapping.vma.vm_flags & VM_SHARED
        and int(mem.ram.words[mapping.table, mapping.slot]) & (PAGE_DIRTY | PAGE_RW)
        for mapping in page_mappings(mem, pfn)
    )
    page_mkclean(mem, np.array([pfn]))
    return unclean


def _collect_procs(
    mem: Memory, pfn: int, mapping: AnonVma | AddressSpace, current: Mm | None
) -> list[ToKill]:
    """Those to be told at once: `current`, and who has asked for it (early kill).

    Of a file, every process that maps that part of it counts, whether or not it has the page.
    """
    head = mem.pages.head_of(pfn)
    index = int(mem.pages.index[head]) + pfn - head
    size_shift = PAGE_SHIFT + int(mem.pages.order[head])
    mapped = _mapped_at(mem, pfn)
    found = []
    for mm in mem.mms:
        if mm is not current and not _early_kill(mem, mm):
            continue
        for vma in _vmas_of(mapping):
            addr = vma.address_of(index)
            covers = vma.mm is mm and vma.vm_start <= addr < vma.vm_end
            if covers and (isinstance(mapping, AddressSpace) or (id(vma), addr) in mapped):
                found.append(ToKill(mm, addr, size_shift))
    return found


def _mapped_at(mem: Memory, pfn: int) -> set[tuple[int, int]]:
    """By which VMA and where `pfn` is mapped, alone or with all of its huge page."""
    head = mem.pages.head_of(pfn)
    alone = [each for each in page_mappings(mem, pfn) if each.table >= 0]
    whole = [each for each in page_mappings(mem, head) if each.table < 0]
    within = pfn - head << PAGE_SHIFT
    return {(id(each.vma), each.addr) for each in alone} | {
        (id(each.vma), each.addr + within) for each in whole
    }


def _vmas_of(mapping: AnonVma | AddressSpace) -> list[Vma]:
    return mapping.i_mmap if isinstance(mapping, AddressSpace) else mapping.vmas


def _early_kill(mem: Memory, mm: Mm) -> bool:
    """find_early_kill_thread(): by prctl(PR_MCE_KILL), else by sysctl."""
    if mm.mce_kill == "default":
        return mem.hwpoison.early_kill
    return mm.mce_kill == "early"


def _unmap(mem: Memory, mapping: Mapping, pfn: int, *, hwpoison: bool) -> None:
    """try_to_unmap_one(): the entry becomes a hwpoison entry, a swap entry, or none."""
    vma, one = mapping.vma, np.array([pfn])
    ptes = mem.ram.words[mapping.table]
    for notifier in vma.mm.mmu_notifiers:
        notifier.invalidate_range_start(mapping.addr, mapping.addr + (1 << PAGE_SHIFT))
    if not hwpoison and mem.pages.flags[pfn] & PG_swapcache:
        unmap_to_swap(mem, vma, ptes, mapping.slot, pfn, int(mem.pages.private[pfn]))
    else:
        word = ptes[mapping.slot : mapping.slot + 1].copy()
        if int(word[0]) & PAGE_DIRTY:
            set_page_dirty(mem, one)
        ptes[mapping.slot] = make_swap_pte(SWP_HWPOISON, pfn) if hwpoison else 0
        if not hwpoison:
            leave_markers(vma, ptes, np.array([mapping.slot]), word)
        counter = mm_counter(int(mem.pages.flags[pfn]))
        page_remove_rmap(mem, one, vma)
        mem.mod_mm(vma.mm, counter, -1)
        put_pages(mem, one)
    for notifier in vma.mm.mmu_notifiers:
        notifier.invalidate_range_end(mapping.addr, mapping.addr + (1 << PAGE_SHIFT))


def _kill_proc(mem: Memory, victim: ToKill, pfn: int, current: Mm | None) -> None:
    """SIGBUS: action required of who has touched the page, action optional for everybody else."""
    task = mem.sched.current if victim.mm is current else victim.mm.task
    assert task is not None
    _log(
        mem,
        pfn,
        f"Sending SIGBUS to {task.comm}:{task.pid} due to hardware memory corruption",
    )
    code = BUS_MCEERR_AR if victim.mm is current else BUS_MCEERR_AO
    victim.mm.signals.append(Signal(signal.SIGBUS, code, victim.addr, victim.size_shift))


def _kill_accessing_process(mem: Memory, mm: Mm, pfn: int) -> int:
    """Poison that is known has been touched again: find where, and signal that."""
    for vma in mm.vmas:
        for addr in range(vma.vm_start, vma.vm_end, HPAGE_PMD_NR << PAGE_SHIFT):
            found = _find_poison(mem, vma, addr, pfn)
            if found is not None:
                _kill_proc(mem, ToKill(mm, found), pfn, mm)
                return EHWPOISON
    return errno.EFAULT


def _find_poison(mem: Memory, vma: Vma, addr: int, pfn: int) -> int | None:
    """Where in the block of `addr` an entry maps `pfn`, or says that it did."""
    base = addr & -(HPAGE_PMD_NR << PAGE_SHIFT)
    pmd = pmd_of(mem, vma.mm, addr)
    if not pmd:
        return None
    if pmd_trans_huge(pmd):
        inside = pfn - pte_pfn(pmd)
        return base + (inside << PAGE_SHIFT) if 0 <= inside < HPAGE_PMD_NR else None
    for slot, pte in enumerate(mem.ram.words[pte_pfn(pmd)].tolist()):
        here = pte & PAGE_PRESENT and pte_pfn(pte) == pfn
        was = is_swap_pte(pte) and swp_type(pte) == SWP_HWPOISON and swp_offset(pte) == pfn
        if here or was:
            return base + (slot << PAGE_SHIFT)
    return None


# What is done with each kind of page (error_states).

Action = Callable[[Memory, int, str], str]


def _page_action(mem: Memory, pfn: int, flags: int) -> int:
    """page_action(): the first kind that fits."""
    kind, action = _identify(flags)
    return _action_result(mem, pfn, kind, action(mem, pfn, kind))


def _identify(flags: int) -> tuple[str, Action]:
    """identify_page_state(): what the log calls the page, and who deals with it."""
    swapcache = PG_swapcache | PG_swapbacked
    dirty = bool(flags & PG_dirty)
    word = "dirty" if dirty else "clean"
    if flags & PG_reserved:
        return "reserved kernel page", _me_kernel
    if flags & swapcache == swapcache:
        return f"{word} swapcache page", _me_swapcache_dirty if dirty else _me_swapcache_clean
    for bit, text in ((PG_mlocked, " mlocked"), (PG_unevictable, " unevictable"), (PG_lru, "")):
        if flags & bit:
            return f"{word}{text} LRU page", _me_pagecache_dirty if dirty else _me_pagecache_clean
    return "unknown page", _me_unknown


def _me_kernel(_mem: Memory, _pfn: int, _kind: str) -> str:
    return IGNORED


def _me_unknown(mem: Memory, pfn: int, _kind: str) -> str:
    _log(mem, pfn, "Unknown page state")
    return IGNORED if mem.version.action_result_says_more else FAILED


def _me_pagecache_clean(mem: Memory, pfn: int, kind: str) -> str:
    """Page cache that is clean, or marked as lost: out of the cache; shmem stays, as the proof."""
    _delete_from_lru_cache(mem, pfn)
    if mem.pages.flags[pfn] & PG_anon:
        return RECOVERED
    mapping = mem.mappings.get(int(mem.pages.mapping[pfn]))
    if not isinstance(mapping, AddressSpace):
        return FAILED
    one = np.array([pfn])
    shmem = isinstance(mapping.host, ShmemInode)
    if not shmem:
        filemap_release_pages(mem, one)
        filemap_remove_pages(mem, mapping, np.array([int(mem.pages.index[pfn])]), one)
    return FAILED if _has_extra_refcount(mem, pfn, kind, 1 + shmem) else RECOVERED


def _me_pagecache_dirty(mem: Memory, pfn: int, kind: str) -> str:
    """The data are lost: the next write, fsync or close of the file is to fail with EIO."""
    if not mem.version.no_pg_error:
        mem.pages.flags[pfn] |= np.uint32(PG_error)
    mapping = mem.mappings.get(int(mem.pages.mapping[pfn]))
    if isinstance(mapping, AddressSpace):
        mapping.wb_err = errseq_set(mapping.wb_err, errno.EIO)
    return _me_pagecache_clean(mem, pfn, kind)


def _me_swapcache_dirty(mem: Memory, pfn: int, kind: str) -> str:
    """It stays in the swap cache, not up to date: who faults it in finds it and gets SIGBUS."""
    mem.pages.flags[pfn] &= np.uint32(~(PG_dirty | PG_uptodate) & 0xFFFFFFFF)
    done = _delete_from_lru_cache(mem, pfn)
    extra = _has_extra_refcount(mem, pfn, kind, 1 + done)
    return DELAYED if done and not extra else FAILED


def _me_swapcache_clean(mem: Memory, pfn: int, kind: str) -> str:
    """The swap device has a good copy."""
    delete_from_swap_cache(mem, pfn)
    done = _delete_from_lru_cache(mem, pfn)
    extra = _has_extra_refcount(mem, pfn, kind, 1)
    return RECOVERED if done and not extra else FAILED


def _delete_from_lru_cache(mem: Memory, pfn: int) -> bool:
    """Off its LRU list and out of its cgroup's charge; False if it is on no list."""
    flags = int(mem.pages.flags[pfn])
    if not flags & PG_lru:
        return False
    del_pages_from_lru(mem, np.array([pfn]))
    mem.pages.flags[pfn] &= np.uint32(~(PG_active | PG_unevictable) & 0xFFFFFFFF)
    uncharge(mem, int(mem.pages.memcg[pfn]), 1)
    mem.pages.memcg[pfn] = 0
    return True


def _has_extra_refcount(mem: Memory, pfn: int, kind: str, expected: int) -> bool:
    """Somebody besides memory_failure, and a cache that keeps the page, refers to it."""
    extra = int(mem.pages.refcount[pfn]) - expected
    if extra > 0:
        _log(mem, pfn, f"{kind} still referenced by {extra} users")
    return extra > 0


def _action_result(mem: Memory, pfn: int, kind: str, result: str) -> int:
    """Count it, log it; 0 if the page has been dealt with, or will be."""
    mem.num_poisoned_pages += 1
    stats = mem.nodes[mem.nid_of(pfn)].memory_failure
    stats[result.lower()] += 1
    stats["total"] += 1
    _log_result(mem, pfn, kind, result)
    return 0 if result in (RECOVERED, DELAYED) else errno.EBUSY


def _log_result(mem: Memory, pfn: int, kind: str, result: str) -> None:
    _log(mem, pfn, f"recovery action for {kind}: {result}")


def _log(mem: Memory, pfn: int, text: str) -> None:
    mem.printk(f"Memory failure: {pfn:#x}: {text}")


# Later, and back.


def memory_failure_queue(mem: Memory, pfn: int) -> None:
    """Have `pfn` dealt with soon, by a kernel worker: the caller holds locks."""
    mem.hwpoison.queue.append(pfn)


def memory_failure_work(mem: Memory) -> None:
    """memory_failure_work_func(): what is queued, as far as nobody has it locked."""
    queued, mem.hwpoison.queue = mem.hwpoison.queue, []
    for pfn in queued:
        if _would_wait(mem, pfn, count_increased=False):
            mem.hwpoison.queue.append(pfn)
        else:
            mem.sched.current.run(memory_failure(mem, pfn))


def unpoison_memory(mem: Memory, pfn: int) -> int:
    """Undo an injected failure: the page may be used again. What it held is gone.

    Returns: 0; EOPNOTSUPP after a real failure; EBUSY for a page that is not poisoned, or that
    somebody still refers to.
    """
    pages = mem.pages
    if mem.hwpoison.hw_memory_failure:
        return _refuse(mem, pfn, "Disabled after HW memory failure", errno.EOPNOTSUPP)
    if not pages.flags[pfn] & PG_hwpoison:
        return _refuse(mem, pfn, "Page was already unpoisoned", errno.EBUSY)
    head = pages.head_of(pfn)
    if pages.refcount[head] > 1:
        return _refuse(mem, pfn, "Someone grabs the hwpoison page", errno.EBUSY)
    if pages.flags[head] & (PG_reserved | PG_table):
        return errno.EBUSY
    if pages.total_mapcount(head):
        return _refuse(mem, pfn, "Someone maps the hwpoison page", errno.EBUSY)
    cached = isinstance(mem.mappings.get(int(pages.mapping[head])), AddressSpace)
    if cached or pages.flags[head] & PG_swapcache:
        return _refuse(mem, pfn, "the hwpoison page has non-NULL mapping", errno.EBUSY)
    mem.hwpoison.refs.discard(pfn)
    put_page_back_buddy(mem, pfn)
    mem.num_poisoned_pages -= 1
    _unpoison_log(mem, pfn, "Software-unpoisoned page")
    return 0


def _refuse(mem: Memory, pfn: int, why: str, number: int) -> int:
    _unpoison_log(mem, pfn, why)
    return number


def _unpoison_log(mem: Memory, pfn: int, text: str) -> None:
    """unpoison_pr_info()."""
    if not mem.hwpoison.unpoison.allows(mem.clock.now_ns, mem.printk):
        return
    if mem.version.offline_logs_frame_first:
        mem.printk(f"Unpoison: {pfn:#x}: {text[0].lower()}{text[1:]}")
    else:
        mem.printk(f"Unpoison: {text} {pfn:#x}")
