"""`python -m datalloy`, the same as the command `datalloy`."""

from datalloy.cli import main

if __name__ == "__main__":
    main()
