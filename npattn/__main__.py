"""``python -m npattn`` is the command line."""

import sys

from npattn.cli import main

sys.exit(main())
