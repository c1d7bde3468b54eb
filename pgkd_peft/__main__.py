"""``python -m pgkd_peft …`` is ``pgkd …``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
