"""`python -m lss` is `lss`."""

import sys

from lss.cli import main

sys.exit(main())
