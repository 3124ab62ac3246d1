"""The weights in the box, each with its model card."""

from pathlib import Path

WEIGHTS = Path(__file__).parent
