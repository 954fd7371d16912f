"""`python -m whisper_static_cache`: see `cli`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
