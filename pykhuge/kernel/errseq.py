"""An error that each of many watchers is told of once (lib/errseq.c).

A value is one int: the last errno, whether anybody has been told of it, and how often one came
after somebody had been. A watcher keeps the value it has seen; 0 is no error so far.
"""

from __future__ import annotations

__all__ = ["errseq_check_and_advance", "errseq_sample", "errseq_set"]

_ERRNO = (1 << 12) - 1
_SEEN = 1 << 12
_COUNT = 1 << 13


def errseq_set(value: int, errno: int) -> int:
    """The value once `errno` has come up; an error nobody was told of counts as the same one."""
    count = value & -_COUNT
    return (count + _COUNT if value & _SEEN else count) | errno


def errseq_sample(value: int) -> int:
    """What a new watcher begins with: it is told of an error that nobody was told of yet."""
    return value if value & _SEEN else 0


def errseq_check_and_advance(value: int, since: int) -> tuple[int, int, int]:
    """What a watcher that has seen `since` is told now.

    Returns: the errno, 0 for nothing new; the value; and what the watcher has seen now.
    """
    if value == since:
        return 0, value, since
    value |= _SEEN
    return value & _ERRNO, value, value
