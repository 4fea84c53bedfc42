"""Builds the extension ``pykhuge._copy``: csrc/ behind the declarations of its two headers.

Run by setup.py only. The declarations are the headers' own, between their two marks, so that what
Python calls and what C defines cannot differ.

Free threading: cffi declares every module it generates ``Py_MOD_GIL_NOT_USED`` (from 2.0 on), so
nothing is to be said here; the core is thread-safe on its own.
"""

import sysconfig
from pathlib import Path

from cffi import FFI

SOURCES = [
    "csrc/copy_mc.c",
    "csrc/copy_page.c",
    "csrc/highpage_module.c",
    "csrc/machine_check.c",
    "csrc/scan_ptes.c",
]
DECLARED = ["csrc/pykhuge.h", "csrc/scan_ptes.h"]
HEADERS = [*DECLARED, "csrc/copy_page.h", "csrc/machine_check.h"]


def declarations(header: str) -> str:
    """The part of a header that cffi is to read."""
    _, _, after = Path(header).read_text().partition("/* cdef: begin */")
    inside, mark, _ = after.partition("/* cdef: end */")
    if not mark:
        raise ValueError(f"{header} has no cdef marks")
    return inside


# cffi asks for the oldest limited API; the wheel promises 3.11's.
limited_api = (
    [] if sysconfig.get_config_var("Py_GIL_DISABLED") else [("Py_LIMITED_API", "0x030b0000")]
)

ffibuilder = FFI()
for header in DECLARED:
    ffibuilder.cdef(declarations(header))
ffibuilder.set_source(
    "pykhuge._copy",
    '#include "pykhuge.h"\n#include "scan_ptes.h"',
    sources=SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    define_macros=limited_api,
    extra_compile_args=["-std=gnu11", "-O2"],
)
