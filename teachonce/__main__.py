"""``python -m teachonce``."""

import sys

from teachonce.cli import main

if __name__ == "__main__":
    sys.exit(main())
