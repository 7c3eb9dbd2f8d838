"""``python -m npattn`` is the command line."""

import sys

from npattn.cli import main

if __name__ == "__main__":  # the process of a candidate imports this, too
    sys.exit(main())
