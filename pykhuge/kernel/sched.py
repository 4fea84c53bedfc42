"""Tasks and their steps: where one task may lose the CPU to another.

What the kernel does with locks dropped and retaken is a generator here. It yields a `Step` wherever
another task could run: a lock awaited (`Acquire`), a lock dropped (`Release`), something else
awaited (`Until`), or a named place (`Preempt`). `Task.run` drives it to the end; `Task.step` goes
to the next yield, so that a test or a scheduler can put other tasks in between.

A function made with `@steps` is called plainly, or with `.steps` for its generator:

    process.munmap(addr, length)                          # runs to the end
    task = machine.spawn(process.munmap.steps(addr, length))  # runs step by step
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from pykhuge.kernel.locking import Holder, Mode, RwSem
from pykhuge.kernel.panic import KernelBug, KernelPanic

__all__ = [
    "Acquire",
    "Foresee",
    "Preempt",
    "Release",
    "Sched",
    "Step",
    "Steps",
    "Task",
    "Until",
    "WouldBlock",
    "steps",
]

TASK_COMM_LEN = 16  # with the NUL that ends it

P = ParamSpec("P")
T = TypeVar("T")
Self_ = TypeVar("Self_", bound="HasTask")


class WouldBlock(BlockingIOError):
    """A plain call had to wait for a lock that a paused task holds: nobody would ever run it."""


class Acquire:
    """Waits for a sleeping lock."""

    __slots__ = ("lock", "mode")

    def __init__(self, lock: RwSem, mode: Mode) -> None:
        self.lock = lock
        self.mode = mode

    def ready(self) -> bool:
        """Whether the task may go on at once."""
        return self.lock.available(self.mode)

    def take_effect(self, task: Task[Any]) -> None:
        """Do what was announced."""
        self.lock.lock(task, self.mode)

    def __str__(self) -> str:
        return f"acquire {self.lock.name} for {self.mode.value}"


class Release:
    """Drops a sleeping lock; whoever waits for it may run now."""

    __slots__ = ("lock",)

    def __init__(self, lock: RwSem) -> None:
        self.lock = lock

    def ready(self) -> bool:
        """Whether the task may go on at once."""
        return True

    def take_effect(self, task: Task[Any]) -> None:
        """Do what was announced."""
        self.lock.unlock(task)

    def __str__(self) -> str:
        return f"release {self.lock.name}"


class Until:
    """Sleeps until others have brought something about, e.g. unlocked a page; holds no lock."""

    __slots__ = ("_condition", "_what")

    def __init__(self, what: str, condition: Callable[[], bool]) -> None:
        self._what = what
        self._condition = condition

    def ready(self) -> bool:
        """Whether the task may go on at once."""
        return self._condition()

    def take_effect(self, task: Task[Any]) -> None:
        """Nothing: what it waited for is looked at anew."""

    def __str__(self) -> str:
        return f"wait until {self._what}"


class Foresee:
    """Looks ahead to a wait that is to come once things have been changed.

    A plain call, which cannot wait, ends here instead, with nothing changed. A task of its own
    takes no notice, and waits when it comes to it.
    """

    __slots__ = ("_what", "fulfilled")

    def __init__(self, what: str, fulfilled: Callable[[], bool]) -> None:
        self._what = what
        self.fulfilled = fulfilled

    def ready(self) -> bool:
        """Whether the task may go on at once."""
        return True

    def take_effect(self, task: Task[Any]) -> None:
        """Nothing: it only asks."""

    def __str__(self) -> str:
        return f"wait until {self._what}"


@dataclass(frozen=True, slots=True)
class Preempt:
    """A place without a lock of its own at which other tasks may run, by its name."""

    where: str

    def ready(self) -> bool:
        """Whether the task may go on at once."""
        return True

    def take_effect(self, task: Task[Any]) -> None:
        """Nothing: it only marks the place."""

    def __str__(self) -> str:
        return self.where


Step = Acquire | Release | Until | Foresee | Preempt
Steps = Generator[Step, None, T]


class Sched:
    """What runs now: the kernel's `current`. After a panic nothing runs any more."""

    def __init__(self) -> None:
        self.panic: KernelPanic | None = None
        self.current: Task[Any] = Task(self, "swapper/0", 0)


class Task(Holder, Generic[T]):
    """One thread of execution: who holds locks, and whose name stands in the trace.

    `comm` is cut to 15 bytes, as the kernel has it. `pending` is the step it has announced and not
    yet taken; `result` is there once `done`.
    """

    def __init__(self, sched: Sched, comm: str, pid: int, cpu: int = 0) -> None:
        super().__init__(comm.encode()[: TASK_COMM_LEN - 1].decode(errors="ignore"))
        self.sched = sched
        self.pid = pid
        self.cpu = cpu
        self.pending: Step | None = None
        self.done = False
        self.error: BaseException | None = None
        self._generator: Steps[T] | None = None
        self._result: T | None = None

    @property
    def idle(self) -> bool:
        """Whether it runs nothing of its own."""
        return self.done or self._generator is None

    @property
    def result(self) -> T | None:
        """What the generator returned; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self._result

    def start(self, generator: Steps[T]) -> None:
        """Take up `generator`; nothing of it runs before the first `step`."""
        self._generator = generator
        self.done, self.error, self.pending, self._result = False, None, None, None

    def step(self) -> bool:
        """Run up to the next yield. Does nothing and returns False if it must wait or is done.

        Raises: KernelPanic if the host has died meanwhile.
        """
        if not self.done and self.sched.panic is not None:
            raise self.sched.panic
        if self.done or self._generator is None or (self.pending and not self.pending.ready()):
            return False
        if self.pending is not None:
            self.pending.take_effect(self)
            self.pending = None
        self.sched.current = self
        try:
            self.pending = next(self._generator)
            while isinstance(self.pending, Foresee):
                self.pending = next(self._generator)
        except StopIteration as stop:
            self.done = True
            self._result = stop.value
        except BaseException as error:
            self.done = True
            self.error = error
        return True

    def run_until(self, where: str) -> None:
        """Step until the announced step, `str(task.pending)`, is `where`.

        Steps are locks awaited and dropped ("acquire mmap_lock for write", "release mmap_lock"),
        waits, and named places: "swapin" and "copied" in a collapse of anonymous memory;
        "scanned", "swapin" or "readahead", "nr_thps", "copy" and "copied" in that of a file.
        Raises: WouldBlock if it has to wait first; LookupError, naming the steps there were, if it
        has run to its end without coming there.
        """
        met: dict[str, None] = {}
        while self.step():
            if self.pending is not None and str(self.pending) == where:
                return
            met[str(self.pending)] = None
        if not self.done:
            raise WouldBlock(f"{self.comm} waits: {self.pending}")
        steps_met = ", ".join(step for step in met if step != "None")
        raise LookupError(f"{self.comm} ended without a step {where!r}; it had: {steps_met}")

    def finish(self) -> T | None:
        """Run to the end and return the result.

        Raises: WouldBlock if another task holds what it waits for.
        """
        while self.step():
            pass
        if not self.done:
            raise WouldBlock(f"{self.comm} waits: {self.pending}")
        return self.result

    def run(self, generator: Steps[T]) -> T:
        """Run `generator` from start to end in this task's name, beside what it is paused in.

        Raises: WouldBlock if it has to wait: nobody else runs meanwhile.
        """
        self.sched.current = self
        try:
            while True:
                step = next(generator)
                foreseen = isinstance(step, Foresee) and not step.fulfilled()
                if foreseen or not step.ready():
                    self._abandon(generator, step)
                step.take_effect(self)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _abandon(self, generator: Steps[T], step: Step) -> None:
        generator.close()
        if self.held:
            raise KernelBug(f"{self.comm} holds {self.held[-1]} and waits to {step}: deadlock")
        what = f"waits to {step}: {step.lock}" if isinstance(step, Acquire) else f"has to {step}"
        raise WouldBlock(f"{self.comm} {what}")


class HasTask(Protocol):
    """Something whose calls run in the name of a task, on a machine that may have died."""

    @property
    def task(self) -> Task[Any]: ...

    def check_alive(self) -> None: ...


class BoundSteps(Generic[P, T]):
    """One method of one object: call it, or take its steps."""

    def __init__(self, function: Callable[..., Steps[T]], owner: HasTask) -> None:
        self._function = function
        self._owner = owner
        self.__doc__ = function.__doc__

    @property
    def __wrapped__(self) -> Callable[..., Steps[T]]:
        """The method, for inspect.signature and help."""
        method: Callable[..., Steps[T]] = self._function.__get__(self._owner)
        return method

    def __repr__(self) -> str:
        call = f"{self._function.__qualname__}{inspect.signature(self.__wrapped__)}"
        return f"<{call}; with .steps, the same to be run step by step>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        self._owner.check_alive()
        result: T = self._owner.task.run(self._function(self._owner, *args, **kwargs))
        return result

    def steps(self, *args: P.args, **kwargs: P.kwargs) -> Steps[T]:
        """The generator behind the call, for `Machine.spawn`."""
        self._owner.check_alive()
        return self._function(self._owner, *args, **kwargs)


class steps(Generic[Self_, P, T]):  # noqa: N801 (a decorator, named as it reads)
    """Make a generator method callable plainly, with `.steps` for the generator itself."""

    def __init__(self, function: Callable[Concatenate[Self_, P], Steps[T]]) -> None:
        self._function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type[Self_]) -> steps[Self_, P, T]: ...
    @overload
    def __get__(self, owner: Self_, kind: type[Self_]) -> BoundSteps[P, T]: ...
    def __get__(
        self, owner: Self_ | None, kind: type[Self_]
    ) -> steps[Self_, P, T] | BoundSteps[P, T]:
        if owner is None:
            return self
        return BoundSteps(self._function, owner)
