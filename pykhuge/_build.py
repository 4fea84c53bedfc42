"""Builds the extension ``pykhuge._copy``: csrc/ behind the declarations of csrc/pykhuge.h.

Run by setup.py only. The declarations are the header's own, between its two marks, so that what
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
]
HEADERS = ["csrc/pykhuge.h", "csrc/copy_page.h", "csrc/machine_check.h"]


def declarations(header: str) -> str:
    """The part of the header that cffi is to read."""
    _, _, after = header.partition("/* cdef: begin */")
    inside, mark, _ = after.partition("/* cdef: end */")
    if not mark:
        raise ValueError("csrc/pykhuge.h has no cdef marks")
    return inside


# cffi asks for the oldest limited API; the wheel promises 3.11's.
limited_api = (
    [] if sysconfig.get_config_var("Py_GIL_DISABLED") else [("Py_LIMITED_API", "0x030b0000")]
)

ffibuilder = FFI()
ffibuilder.cdef(declarations(Path("csrc/pykhuge.h").read_text()))
ffibuilder.set_source(
    "pykhuge._copy",
    '#include "pykhuge.h"',
    sources=SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    define_macros=limited_api,
    extra_compile_args=["-std=gnu11", "-O2"],
)
