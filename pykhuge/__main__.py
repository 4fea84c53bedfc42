"""`python -m pykhuge` is the command `pykhuge`."""

import sys

from pykhuge.cli import main

if __name__ == "__main__":
    sys.exit(main())
