"""Everything but the extension and its ABI is in pyproject.toml."""

import sysconfig

from setuptools import setup

# One wheel serves every GIL build from 3.11 on. Free-threaded builds have no stable ABI (before
# 3.15, which cffi knows), so each gets a wheel of its own.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["pykhuge/_build.py:ffibuilder"],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
