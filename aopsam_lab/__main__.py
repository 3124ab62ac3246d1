"""`python -m aopsam_lab`."""

import sys

from aopsam_lab.cli import main

sys.exit(main())
