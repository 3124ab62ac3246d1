"""`python -m aopsam_lab`."""

from __future__ import annotations

import sys

from aopsam_lab.cli import main

sys.exit(main())
