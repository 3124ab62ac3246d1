"""Studies: methods against data sets, stored row by row, summed up in tables, figures and pages."""

from pathlib import Path

# the folder that holds the package, and in a checkout notebooks/
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
