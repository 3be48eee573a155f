"""`python -m helixd` is the helixd command."""

import sys

from helixd.cli import main

sys.exit(main())
