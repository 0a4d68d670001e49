"""``python -m tightrec.trainer.compare RUN_A RUN_B ... [out=FILE.html]``: finished runs side by side."""

import sys
from pathlib import Path

from tightrec.formats.command import DONE, MISTAKEN, exit_status

DEFAULT_OUT = "comparison.html"

_USAGE = f"""\
usage: python -m tightrec.trainer.compare RUN_A RUN_B ... [out=FILE.html]

  RUN_A ...  folders of finished runs, or a folder that holds them; the first is what the others compare with
  out        the page to write ({DEFAULT_OUT})"""


def main(words: list[str]) -> int:
    """Compare the runs given; returns the exit status.

    0: done; else as in :func:`tightrec.formats.command.exit_status`, with no page or the one that was there
    before.
    """
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    folders = [word for word in words if not word.startswith("out=")]
    asked = "--help" in words or "-h" in words
    if asked or not folders or any(word.startswith("-") for word in folders):
        print(_USAGE, file=sys.stdout if asked else sys.stderr)
        return DONE if asked else MISTAKEN

    def run() -> int:
        from tightrec.trainer.compare.comparison import compare

        compare([Path(word) for word in folders], Path(outs[-1] if outs else DEFAULT_OUT))
        return DONE

    return exit_status(run, "no page was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
