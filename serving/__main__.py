"""``python -m tightrec.serving explore|serve|load|simulate key=value ...``."""

import sys

from tightrec.formats.command import exit_status


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 1: what the command says of itself, such as requests that failed; and as in
    :func:`tightrec.formats.command.exit_status`.
    """

    def run() -> int:
        from tightrec.serving import commands

        return commands.run(sys.argv[1:] if words is None else words)

    return exit_status(run, "files are either whole or absent")


if __name__ == "__main__":
    sys.exit(main())
