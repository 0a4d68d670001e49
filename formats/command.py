"""How a command ends: its exit status, and a sentence for whatever stopped it."""

import os
import sys
from collections.abc import Callable

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 130


def exit_status(run: Callable[[], int], interrupted: str) -> int:
    """Call ``run``; returns its status, or the one that its exception stands for.

    1: the disk or the memory was full, or a file or library could not be read; or nobody reads the output any
    more. 2: a mistake in the words or settings, or a damaged file (ValueError). 130: interrupted by Ctrl-C.

    Args:
        run: imports what it needs by itself, so that Ctrl-C while modules are loaded ends in the same way.
        interrupted: what to say on Ctrl-C about what was left behind.
    """
    try:
        status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter's last flush must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKEN
    except (OSError, MemoryError, ImportError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        words_of_it = getattr(error, "strerror", None) or str(error) or "out of memory"
        print(f"error: {where}{words_of_it}", file=sys.stderr)
        return FAILED
