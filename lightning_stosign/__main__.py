"""``python -m lightning_stosign``."""

import sys

from lightning_stosign.cli import main

if __name__ == "__main__":
    sys.exit(main())
