"""What all commands share: whatever stops one is said in one line."""

import sys
from collections.abc import Callable


def in_one_line(name: str, work: Callable[[], int | None], kept: str, failed: int = 2) -> int:
    """Run a command: 0 or what it returns, `failed` after an error, 130 after Ctrl-C.

    The line begins with the name; `kept` says what an interruption leaves.
    """
    try:
        return work() or 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {kept}", file=sys.stderr)
        return 130
