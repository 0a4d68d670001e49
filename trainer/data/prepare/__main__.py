"""``python -m tightrec.trainer.data.prepare criteo|movielens|jester src=... dst=... [key=value ...]``."""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.trainer.data.prepare import criteo, jester, movielens
from tightrec.trainer.data.prepare.common import PrepareSettings
from tightrec.trainer.data.prepare.criteo_settings import CriteoSettings

DATA_SETS: dict[str, tuple[type[PrepareSettings], Callable[[Any, Console], Any]]] = {
    "criteo": (CriteoSettings, criteo.prepare),
    "movielens": (movielens.MovieLensSettings, movielens.prepare),
    "jester": (jester.JesterSettings, jester.prepare),
}
"""The settings of each data set, and what carries them out."""

USAGE = """\
python -m tightrec.trainer.data.prepare criteo|movielens|jester src=... dst=... [key=value ...]

Writes the folder DST: schema.json and train/, valid/ and test/ of parquet files. A run that was broken off
is continued by the same command."""

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(words: Sequence[str]) -> int:
    """Run the command line ``words``; returns the exit code: 0, 1 failed, 2 misused, 130 interrupted."""
    console = Console(stderr=True)
    name, *rest = words or ["--help"]
    asked = {"-h", "--help"} & set(words) or not rest
    if name in DATA_SETS and asked:
        print(f"{USAGE}\n\n{describe(name, DATA_SETS[name][0])}")
        return 0
    if asked and name in ("-h", "--help"):
        print("\n\n".join([USAGE, *(describe(name, cls) for name, (cls, _) in DATA_SETS.items())]))
        return 0
    if name not in DATA_SETS:
        print(f"There is no data set {name!r}. Known: {', '.join(DATA_SETS)}.", file=sys.stderr)
        return MISUSED
    cls, prepare = DATA_SETS[name]
    try:
        settings = from_words(cls, rest, f"prepare {name}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return MISUSED
    try:
        prepare(settings, console)
    except ValueError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else error.strerror or str(error)
        print(
            f"{error.filename or settings.dst}: {cause}. Put that right and give the same command again: it "
            "continues at the last finished part.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print(
            "Interrupted. Give the same command again to continue at the last finished part.", file=sys.stderr
        )
        return INTERRUPTED
    else:
        return 0
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
