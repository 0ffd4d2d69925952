"""``python -m quotientopt``."""

import sys

from quotientopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
