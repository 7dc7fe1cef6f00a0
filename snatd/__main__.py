"""`python -m snatd`."""

import sys

from snatd.cli import main

sys.exit(main())
