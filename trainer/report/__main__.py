"""``python -m tightrec.trainer.report RUN_FOLDER``: builds ``report.html`` again, from what the run wrote."""

import sys
from pathlib import Path

from tightrec.trainer.report.html import write_report


def main(words: list[str]) -> int:
    """Write the reports of the given run folders; returns the exit status, 2 for a user's mistake."""
    if not words or any(word.startswith("-") for word in words):
        print("usage: python -m tightrec.trainer.report RUN_FOLDER ...", file=sys.stderr)
        return 0 if "--help" in words or "-h" in words else 2
    try:
        for word in words:
            print(write_report(Path(word)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
