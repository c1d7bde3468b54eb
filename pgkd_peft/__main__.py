"""``python -m pgkd_peft …`` is ``pgkd …``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
