r"""What /sys/kernel/mm/transparent_hugepage holds: the knobs as files, parsed as there.

    machine.sysfs["khugepaged/max_ptes_none"] = "256\n"
    machine.sysfs["enabled"]  # "always [madvise] never\n"

Names are relative to that folder. What a file refuses is OSError with the errno of write(2).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pykhuge.hw.memory import HPAGE_PMD_SIZE, PAGE_SIZE
from pykhuge.khugepaged.control import KNOBS, KhugepagedSettings
from pykhuge.mm.errors import os_error
from pykhuge.mm.mmzone import ThpSettings

__all__ = ["Sysfs"]

ULONG_MAX = (1 << 64) - 1
SIZE = "hugepages-2048kB"  # of all sizes the one that there is


class _File(NamedTuple):
    """show: its text. store: takes what was written, or None where it is read only."""

    show: Callable[[], str]
    store: Callable[[str], None] | None


class Sysfs(Mapping[str, str]):
    """The files by name; reading gives their text, writing turns the knob.

    Raises: OSError ENOENT (no such file), EACCES (read only), EINVAL or ERANGE as the kernel does.
    """

    def __init__(self, thp: ThpSettings, settings: KhugepagedSettings) -> None:
        self._files = {
            "enabled": _choice(thp, "enabled", thp.ENABLED),
            "defrag": _choice(thp, "defrag", thp.DEFRAG),
            "shmem_enabled": _choice(thp, "shmem_enabled", thp.SHMEM_ENABLED, _copied_word),
            "use_zero_page": _flag(thp, "use_zero_page"),
            "hpage_pmd_size": _File(lambda: f"{HPAGE_PMD_SIZE}\n", None),
            "khugepaged/defrag": _flag(settings, "defrag"),
        }
        if thp.version.per_size_enabled:
            self._files[f"{SIZE}/enabled"] = _choice(thp, "size_enabled", thp.SIZE_ENABLED)
        if thp.version.per_size_shmem_enabled:
            choices = thp.SIZE_SHMEM_ENABLED
            self._files[f"{SIZE}/shmem_enabled"] = _choice(thp, "size_shmem_enabled", choices)
        for name in KNOBS:
            self._files.setdefault(f"khugepaged/{name}", _number(settings, name))
        for name in ("pages_collapsed", "full_scans"):
            self._files[f"khugepaged/{name}"] = _File(_shows_number(settings, name), None)

    def __getitem__(self, name: str) -> str:
        return self._file(name).show()

    def __setitem__(self, name: str, text: str) -> None:
        store = self._file(name).store
        if store is None:
            raise os_error(errno.EACCES, f"{name}: read only")
        if not isinstance(text, str):
            raise TypeError(f"{name}={text!r}: allowed a str, as written to the file")
        # write(2) hands over one page at most; of no bytes it does nothing.
        if text:
            store(text[:PAGE_SIZE])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def _file(self, name: str) -> _File:
        if name not in self._files:
            raise os_error(errno.ENOENT, f"{name}: allowed {', '.join(self)}")
        return self._files[name]


def _word(text: str) -> str:
    """sysfs_streq(): a newline behind the word, where the string ends, does not count."""
    return _c_string(text).removesuffix("\n")


def _copied_word(text: str) -> str:
    """shmem_enabled_store(): 15 bytes at most, and a newline counts unless it is the last."""
    return _c_string(text.removesuffix("\n")) if len(text.encode()) < 16 else ""


def _choice(
    owner: Any, name: str, choices: tuple[str, ...], parse: Callable[[str], str] = _word
) -> _File:
    """All words, the one that holds in brackets; takes one of them."""

    def show() -> str:
        chosen = getattr(owner, name)
        return " ".join(f"[{word}]" if word == chosen else word for word in choices) + "\n"

    def store(text: str) -> None:
        word = parse(text)
        if word not in choices:
            raise os_error(errno.EINVAL, f"{name}={text!r}: allowed {', '.join(choices)}")
        try:
            setattr(owner, name, word)
        except ValueError as error:
            raise os_error(errno.EINVAL, str(error)) from error

    return _File(show, store)


def _flag(owner: Any, name: str) -> _File:
    """0 or 1 (single_hugepage_flag_store): too large for a long is ERANGE."""

    def store(text: str) -> None:
        value = _kstrtoul(name, text, "0 or 1")
        if value > 1:
            raise os_error(errno.EINVAL, f"{name}={text!r}: allowed 0 or 1")
        setattr(owner, name, type(getattr(owner, name))(value))

    return _File(_shows_number(owner, name), store)


def _number(owner: KhugepagedSettings, name: str) -> _File:
    """A number within the knob's bounds; whatever is wrong with it is EINVAL."""
    low, high = KNOBS[name]

    def store(text: str) -> None:
        try:
            setattr(owner, name, _kstrtoul(name, text, f"{low}..{high}"))
        except (OSError, ValueError):
            raise os_error(errno.EINVAL, f"{name}={text!r}: allowed {low}..{high}") from None

    return _File(_shows_number(owner, name), store)


def _shows_number(owner: object, name: str) -> Callable[[], str]:
    return lambda: f"{int(getattr(owner, name))}\n"


def _kstrtoul(name: str, text: str, allowed: str) -> int:
    """kstrtoul(text, 10): decimal, at most a plus sign before it and a newline behind it.

    Raises: OSError EINVAL, ERANGE.
    """
    match = re.match(r"\+?([0-9]+)", string := _c_string(text))
    value = int(match[1]) if match is not None else 0
    # The number is read, and may be too large, before anybody looks at what follows it.
    if value > ULONG_MAX:
        raise os_error(errno.ERANGE, f"{name}={text!r}: allowed {allowed}")
    if match is None or string[match.end() :] not in ("", "\n"):
        raise os_error(errno.EINVAL, f"{name}={text!r}: allowed {allowed}")
    return value


def _c_string(text: str) -> str:
    """What the kernel sees of it: it ends at the first NUL."""
    return text.partition("\0")[0]
