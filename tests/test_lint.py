"""Style, format and types as pyproject.toml writes them down."""

import re
import subprocess
import sys

import pytest

from aopsam_lab import files

ROOT = files.PACKAGE.parent
OFF = "(?m)^ignore_errors|^# mypy:"  # what would leave a module out
TOOLS = ["ruff check --no-cache .", "ruff format --no-cache --check .", "mypy"]


@pytest.mark.parametrize("tool", TOOLS)
def test_neither_ruff_nor_mypy_finds_anything(tool):
    command = [sys.executable, "-m", *tool.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if tool == "mypy":
        assert f"in {len(files.modules())} source files" in done.stdout


def test_no_module_is_left_out_of_the_types():
    settings = [ROOT / "pyproject.toml", *files.modules().values()]
    assert not [path for path in settings if re.search(OFF, path.read_text())]
