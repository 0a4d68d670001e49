"""``python -m tightrec.serving explore|serve|load|simulate key=value ...``."""

import os
import sys

DONE, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 130


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 1: what the command says of itself, such as requests that failed, or a full disk or memory. 2: a
    mistake in the words or settings, or a damaged file. 130: interrupted by Ctrl-C.
    """
    try:
        # Deferred so that Ctrl-C while modules are loaded ends in the same way as later.
        from tightrec.serving import commands

        status = commands.run(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted; files are either whole or absent", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
