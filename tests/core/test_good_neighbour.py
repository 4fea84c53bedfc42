"""Others who have a say about SIGBUS in the same process: each situation in a process of its own.

The same for handlers written in C is in tests/c/test_neighbours.c.
"""

import os
import signal
import subprocess
import sys
import textwrap

PRELUDE = """
import faulthandler, mmap, os, random, signal, sys, threading
import pykhuge
from failing_memory import PAGE, pages, pattern, truncated
keep = truncated()
bad = memoryview(keep.__enter__())[PAGE:2 * PAGE]
to, from_ = pages(1), pages(1, pattern(PAGE))

def survives():
    assert pykhuge.copy_mc_highpage(to, from_, bad_lines=1 << 3) == PAGE - 3 * 64
    assert pykhuge.copy_mc_highpage(to, bad) == PAGE
    assert pykhuge.copy_mc_highpage(to, from_) == 0 and to[:] == from_[:]
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """The script after the prelude, in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ends_well(script: str) -> subprocess.CompletedProcess[str]:
    """Run it; it must come to its end, and faulthandler must have had nothing to say."""
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert "Fatal Python error" not in result.stderr
    return result


def dies_reported(script: str) -> None:
    """Run it; it must die of SIGBUS, after faulthandler said where, once."""
    result = run(script)
    assert result.returncode == -signal.SIGBUS, result.stderr
    assert result.stderr.count("Fatal Python error: Bus error") == 1, result.stderr


def test_fault_outside_a_copy_kills_as_without_us() -> None:
    """The default action is taken, with the signal's own status."""
    result = run("survives(); bad[0]")
    assert (result.returncode, result.stderr) == (-signal.SIGBUS, "")


def test_faulthandler_enabled_before_is_silent_for_ours_and_reports_others() -> None:
    """It never hears of a machine check we recover from, and of every other fault as before."""
    dies_reported("faulthandler.enable(); survives(); bad[0]")


def test_faulthandler_enabled_after_is_silent_for_ours_and_reports_others() -> None:
    """Installed on top of us, it is displaced before the next copy, and chained to."""
    dies_reported("survives(); faulthandler.enable(); survives(); bad[0]")


def test_faulthandler_enabled_and_disabled_repeatedly_still_reports() -> None:
    """Each turn saves and restores one of our entry points; none may lead in a circle."""
    dies_reported(
        """
        for _ in range(50):
            faulthandler.enable(); survives(); faulthandler.disable(); survives()
            faulthandler.enable(); faulthandler.enable(); survives()
        bad[0]
        """
    )


def test_faulthandler_disabled_leaves_the_default() -> None:
    """What is gone is not called any more."""
    result = run("faulthandler.enable(); survives(); faulthandler.disable(); survives(); bad[0]")
    assert (result.returncode, result.stderr) == (-signal.SIGBUS, "")


def test_python_handler_gets_a_signal_sent_by_kill() -> None:
    """signal.signal before or after the first copy: both are called for what is not a fault."""
    ends_well(
        """
        for _ in range(3):
            seen = []
            signal.signal(signal.SIGBUS, lambda *args: seen.append(args))
            survives()
            os.kill(os.getpid(), signal.SIGBUS)
            survives()
            assert len(seen) == 1
        """
    )


def test_signals_sent_by_kill_while_copies_run_all_go_to_the_earlier_handler() -> None:
    """A SIGBUS that is no fault never ends a copy, and is never lost on it."""
    ends_well(
        """
        seen = 0
        def handler(*_):
            global seen
            seen += 1
        signal.signal(signal.SIGBUS, handler)
        source, target = bytes(32 << 20), bytearray(32 << 20)
        done = False
        def send():
            while not done:
                before = seen
                os.kill(os.getpid(), signal.SIGBUS)
                while seen == before and not done:
                    pass
        sender = threading.Thread(target=send)
        sender.start()
        copies = 0
        while seen < 20:
            assert pykhuge.copy_mc(target, source) == 0
            assert pykhuge.copy_mc_highpage(to, from_, bad_lines=2) == PAGE - 64
            copies += 1
        done = True
        sender.join()
        """
    )


def test_kill_with_the_default_action_kills() -> None:
    """The parent sees a process that died of SIGBUS."""
    assert run("survives(); os.kill(os.getpid(), signal.SIGBUS)").returncode == -signal.SIGBUS


def test_fault_in_another_thread_while_this_one_copies_is_reported() -> None:
    """Recovery points belong to threads: the fault of one never lands in the copy of another."""
    dies_reported(
        """
        faulthandler.enable()
        survives()
        def copy():
            source, target = bytes(64 << 20), bytearray(64 << 20)
            while True:
                assert pykhuge.copy_mc(target, source) == 0
        threading.Thread(target=copy, daemon=True).start()
        threading.Event().wait(0.05)
        bad[0]
        """
    )


def test_fork_in_mid_use_leaves_both_sides_working() -> None:
    """The child has the handler, its thread's state, and no lock held by a thread it lacks."""
    ends_well(
        """
        stop = False
        def copy():
            mine = pages(1)
            while not stop:
                assert pykhuge.copy_mc_highpage(mine, from_, bad_lines=1) == PAGE
        threads = [threading.Thread(target=copy) for _ in range(4)]
        for thread in threads: thread.start()
        for _ in range(30):
            child = os.fork()
            if child == 0:
                survives(); faulthandler.enable(); survives()
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            survives()
        stop = True
        for thread in threads: thread.join()
        """
    )


def test_alternate_signal_stack_of_faulthandler_is_used_and_kept() -> None:
    """10,000 jumps off the stack later it is still there for a real overflow."""
    result = run(
        """
        faulthandler.enable()
        for _ in range(10_000):
            assert pykhuge.copy_mc_highpage(to, from_, bad_lines=1) == PAGE
        faulthandler._stack_overflow()
        """
    )
    assert result.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in result.stderr


def test_eight_threads_copy_with_random_poison() -> None:
    """8 x 10,000 copies: counts, prefixes and each thread's own record are exact."""
    ends_well(
        """
        errors = []
        def copy(seed):
            try:
                rng, mine = random.Random(seed), pages(1)
                for _ in range(10_000):
                    bad_lines = rng.getrandbits(64) & rng.getrandbits(64) & rng.getrandbits(64)
                    bad_lines &= rng.getrandbits(64) & -rng.randrange(2)
                    first = (bad_lines & -bad_lines).bit_length() - 1
                    expected = PAGE - 64 * first if bad_lines else 0
                    assert pykhuge.copy_mc_highpage(mine, from_, bad_lines=bad_lines) == expected
                    assert mine[:PAGE - expected] == from_[:PAGE - expected]
                    if expected:
                        assert pykhuge.machine_check().not_copied == expected
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=copy, args=(seed,)) for seed in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        """
    )


def test_copies_run_with_the_gil_released() -> None:
    """A Python thread makes progress strictly within one call that copies; a held GIL stops it.

    The thread that counts would otherwise wait for the end of the call: the switch interval asks
    for the GIL, but C code that holds it does not hear.
    """
    result = ends_well(
        """
        import time
        sys.setswitchinterval(1000)
        source, target = pages(1 << 16), pages(1 << 16)
        ticks, stop = [], False
        def tick():
            while not stop:
                ticks.append(time.monotonic_ns())
                time.sleep(0.001)
        ticker = threading.Thread(target=tick)
        ticker.start()
        time.sleep(0.01)
        start = time.monotonic_ns()
        assert pykhuge.copy_mc(target, source) == 0
        end = time.monotonic_ns()
        inside = sum(start < t < end for t in ticks)
        stop = True
        ticker.join()
        print(inside)
        """
    )
    assert int(result.stdout) > 2


def test_page_that_another_python_thread_provides_can_be_copied() -> None:
    """Every form lets go of the GIL: with userfaultfd a copy may wait for Python itself."""
    ends_well(
        """
        from failing_memory import missing
        def copied(copy):
            with missing() as (memory, provide):
                threading.Timer(0.1, provide).start()
                page = memoryview(memory)[PAGE:2 * PAGE]
                to[:] = from_[:]
                assert not copy(to, page)
                assert to[:] == bytes(PAGE)
        copied(pykhuge.copy_mc_highpage)
        copied(pykhuge.copy_mc_user_highpage)
        copied(pykhuge.copy_highpage)
        copied(pykhuge.copy_mc)
        copied(lambda to, page: pykhuge.copy_mc_huge_page(to, page, [0]))
        """
    )
