"""``python -m tightrec.compression inspect|compress|verify FILE``: stored files and frames by hand."""

import os
import sys
import threading

FAILED, MISTAKEN, INTERRUPTED = 1, 2, 130
_PATIENCE_S = 5.0


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done, and whatever was checked held. 1: a file that cannot be read or written, is damaged or breaks its
    bound, told in a sentence. 2: a mistake in the words. 130: interrupted by Ctrl-C.
    """
    patience = threading.Timer(_PATIENCE_S, _ask_for_patience)
    patience.daemon = True
    patience.start()
    try:
        # Deferred so that Ctrl-C while torch is loaded ends in the same way as later.
        from tightrec.compression import commands

        status = commands.run(sys.argv[1:] if words is None else words)
        if sys.stdout is not None:  # started with a closed output
            sys.stdout.flush()
        return status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else MISTAKEN
    except KeyboardInterrupt:
        print("interrupted; an output file is either whole or absent", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter's last flush must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return _failed(f"{where}{error.strerror or error}")
    except (ValueError, MemoryError, ImportError) as error:
        return _failed(str(error) or "out of memory")
    finally:
        patience.cancel()


def _ask_for_patience() -> None:
    if sys.stderr.isatty():
        print("(working; the first use on a machine compiles the codec for about a minute)", file=sys.stderr)


def _failed(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
