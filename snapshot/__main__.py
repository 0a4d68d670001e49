"""``python -m tightrec.snapshot export|watch|show|debug|compile key=value ...``."""

import sys

from tightrec.formats.command import exit_status


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done, and what was verified passed. 1: a snapshot past its budget, which is not published; and as in
    :func:`tightrec.formats.command.exit_status`.
    """

    def run() -> int:
        from tightrec.snapshot import commands

        return commands.run(sys.argv[1:] if words is None else words)

    return exit_status(run, "a snapshot is either whole or absent")


if __name__ == "__main__":
    sys.exit(main())
