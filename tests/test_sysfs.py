"""The knobs as files: what they show, what they take, and what they refuse."""

import errno

import numpy as np
import pytest

from pykhuge import Machine

UINT_MAX = (1 << 32) - 1
SHOWN = {
    "defrag": "always defer defer+madvise [madvise] never\n",
    "enabled": "always [madvise] never\n",
    "hpage_pmd_size": "2097152\n",
    "khugepaged/alloc_sleep_millisecs": "60000\n",
    "khugepaged/defrag": "1\n",
    "khugepaged/full_scans": "0\n",
    "khugepaged/max_ptes_none": "511\n",
    "khugepaged/max_ptes_shared": "256\n",
    "khugepaged/max_ptes_swap": "64\n",
    "khugepaged/pages_collapsed": "0\n",
    "khugepaged/pages_to_scan": "4096\n",
    "khugepaged/scan_sleep_millisecs": "10000\n",
    "shmem_enabled": "always within_size advise [never] deny force\n",
    "use_zero_page": "1\n",
}
WORDS = {
    "enabled": ("always", "madvise", "never"),
    "defrag": ("always", "defer", "defer+madvise", "madvise", "never"),
    "shmem_enabled": ("always", "within_size", "advise", "never", "deny", "force"),
}
FLAGS = ("use_zero_page", "khugepaged/defrag")
NUMBERS = {
    "khugepaged/pages_to_scan": (1, UINT_MAX),
    "khugepaged/scan_sleep_millisecs": (0, UINT_MAX),
    "khugepaged/alloc_sleep_millisecs": (0, UINT_MAX),
    "khugepaged/max_ptes_none": (0, 511),
    "khugepaged/max_ptes_swap": (0, 511),
    "khugepaged/max_ptes_shared": (0, 511),
}


@pytest.fixture
def machine() -> Machine:
    """A machine as it boots."""
    return Machine()


def refused(machine: Machine, name: str, text: str) -> int | None:
    """The errno of a write, after which nothing may have changed; None if it was taken."""
    before = dict(machine.sysfs)
    refusal: OSError | None = None
    try:
        machine.sysfs[name] = text
    except OSError as error:
        refusal = error
    if refusal is None:
        return None
    assert dict(machine.sysfs) == before
    assert name.rpartition("/")[2] in str(refusal)
    return refusal.errno


def test_a_machine_boots_with_the_kernels_defaults(machine: Machine) -> None:
    """Every file of the folder at REF, and no other."""
    assert dict(machine.sysfs) == SHOWN
    assert len(machine.sysfs) == len(SHOWN)
    assert "enabled" in machine.sysfs
    assert "khugepaged/max_pte_none" not in machine.sysfs


@pytest.mark.parametrize(("name", "words"), WORDS.items())
def test_a_word_is_taken_with_or_without_a_newline_and_stands_in_brackets(
    machine: Machine, name: str, words: tuple[str, ...]
) -> None:
    """One newline, not two, no spaces, no other word, and what follows a NUL is not seen."""
    for word in words:
        for text in (word, f"{word}\n", f"{word}\0x"):
            assert refused(machine, name, text) is None
            assert f"[{word}]" in machine.sysfs[name]
            assert machine.sysfs[name].replace("[", "").replace("]", "").split() == list(words)
            assert getattr(machine.thp, name) == word
        for text in (f"{word}\n\n", f" {word}", f"{word} ", word.upper(), word[:-1], "\n", "1"):
            assert refused(machine, name, text) == errno.EINVAL


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_zero_or_one(machine: Machine, name: str) -> None:
    """EINVAL for other numbers and no numbers, ERANGE for what no long holds."""
    for text in ("0", "1\n", "+0", "01"):
        assert refused(machine, name, text) is None
        assert machine.sysfs[name] == f"{int(text)}\n"
    assert isinstance(machine.thp.use_zero_page, bool)
    for text in ("2", "-1", "x", "\n", "0x1", " 1", "1 ", "1\n\n", str(UINT_MAX), "१"):
        assert refused(machine, name, text) == errno.EINVAL
    assert refused(machine, name, str((1 << 64) - 1)) == errno.EINVAL
    assert refused(machine, name, str(1 << 64)) == errno.ERANGE


@pytest.mark.parametrize(("name", "low", "high"), [(n, *b) for n, b in NUMBERS.items()])
def test_a_number_lies_within_its_bounds(machine: Machine, name: str, low: int, high: int) -> None:
    """Decimal, and EINVAL whatever is wrong."""
    attribute = name.partition("/")[2]
    for value in (low, low + 1, high):
        for text in (f"{value}", f"{value}\n", f"+{value}", f"000{value}"):
            assert refused(machine, name, text) is None
            assert machine.sysfs[name] == f"{value}\n"
            assert getattr(machine.khugepaged_settings, attribute) == value
    for text in (f"{low - 1}", f"{high + 1}", "1 2", "0x10", "1e3", "", "\n", "1.0", str(1 << 64)):
        if text:
            assert refused(machine, name, text) == errno.EINVAL


@pytest.mark.parametrize("name", SHOWN)
def test_writing_nothing_does_nothing(machine: Machine, name: str) -> None:
    """write(2) of no bytes never reaches the knob; a read-only file cannot even be opened."""
    read_only = name in (
        "hpage_pmd_size",
        "khugepaged/pages_collapsed",
        "khugepaged/full_scans",
    )
    assert refused(machine, name, "") == (errno.EACCES if read_only else None)
    if read_only:
        assert refused(machine, name, "1") == errno.EACCES
    assert dict(machine.sysfs) == SHOWN


def test_a_file_that_is_not_there_is_named(machine: Machine) -> None:
    """ENOENT, with what there is."""
    with pytest.raises(FileNotFoundError, match="khugepaged/max: allowed defrag, enabled"):
        machine.sysfs["khugepaged/max"] = "1"
    with pytest.raises(FileNotFoundError, match="nothing"):
        machine.sysfs["nothing"]
    with pytest.raises(TypeError, match="enabled=1: allowed a str"):
        machine.sysfs["enabled"] = 1  # type: ignore[assignment]


def test_attributes_refuse_what_the_files_refuse(machine: Machine) -> None:
    """ValueError with value and bounds; a name that is none is an AttributeError."""
    settings = machine.khugepaged_settings
    for name, (low, high) in NUMBERS.items():
        attribute = name.partition("/")[2]
        for value in (low - 1, high + 1, "1", None, 1.0):
            with pytest.raises(ValueError, match=f"{attribute}=.*: allowed {low}..{high}"):
                setattr(settings, attribute, value)
    with pytest.raises(AttributeError, match="allowed defrag, max_ptes_none"):
        settings.max_pte_none = 1  # type: ignore[attr-defined]
    assert dict(machine.sysfs) == SHOWN


def test_attributes_take_integers_of_any_kind_but_no_booleans(machine: Machine) -> None:
    """A number is kept as an int; True and False are refused, also where 0 and 1 are meant."""
    settings = machine.khugepaged_settings
    for name in NUMBERS:
        attribute = name.partition("/")[2]
        setattr(settings, attribute, np.int64(1))
        assert type(getattr(settings, attribute)) is int
        for truth in (True, False, np.True_):
            with pytest.raises(ValueError, match=f"{attribute}=.*: allowed "):
                setattr(settings, attribute, truth)


def test_what_the_daemon_has_done_is_shown(machine: Machine) -> None:
    """pages_collapsed and full_scans, as attributes and as files; neither can be written."""
    settings = machine.khugepaged_settings
    settings.count("pages_collapsed", 7)
    settings.count("full_scans")
    assert (settings.pages_collapsed, settings.full_scans) == (7, 1)
    assert machine.sysfs["khugepaged/pages_collapsed"] == "7\n"
    assert machine.sysfs["khugepaged/full_scans"] == "1\n"
    for name in ("pages_collapsed", "full_scans"):
        with pytest.raises(AttributeError, match=f"{name}=3: read only"):
            setattr(settings, name, 3)


def test_who_is_told_of_a_sleep_that_is_written_is_a_function(machine: Machine) -> None:
    """Once for each of the two; of no other knob."""
    settings, told = machine.khugepaged_settings, []
    with pytest.raises(TypeError, match="on_sleep_written=None: allowed a function"):
        settings.on_sleep_written = None  # type: ignore[assignment]
    settings.on_sleep_written = lambda: told.append(settings.scan_sleep_millisecs)
    settings.scan_sleep_millisecs = 5
    settings.alloc_sleep_millisecs = 7
    settings.pages_to_scan = 9
    assert told == [5, 5]


def test_the_size_of_a_huge_page_is_an_attribute_too(machine: Machine) -> None:
    """Read only, as the file is."""
    assert machine.thp.hpage_pmd_size == 2 << 20
    with pytest.raises(AttributeError, match="hpage_pmd_size=4096: read only"):
        machine.thp.hpage_pmd_size = 4096  # type: ignore[misc]


def test_what_the_settings_of_huge_pages_keep_is_what_they_show(machine: Machine) -> None:
    """use_zero_page is a boolean however it is written; who follows `enabled` is a function."""
    machine.thp.use_zero_page = 0  # type: ignore[assignment]
    assert machine.thp.use_zero_page is False
    with pytest.raises(TypeError, match="on_enabled=None: allowed a function"):
        machine.thp.on_enabled = None  # type: ignore[assignment]
    machine.thp.enabled = "never"
    assert machine.khugepaged.has_work() is False
