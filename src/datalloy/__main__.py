"""`python -m datalloy`, the same as the command `datalloy`."""

import sys

from datalloy.cli import main

if __name__ == "__main__":
    sys.exit(main())
