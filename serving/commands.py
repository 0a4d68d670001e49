"""The commands of ``python -m tightrec.serving``; what a command needs is imported when it is used."""

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NamedTuple

from tightrec.formats.command import DONE, MISTAKEN
from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe

USAGE = """\
python -m tightrec.serving COMMAND key=value ...

  explore   measure every path (snapshot x device x threads x cache), keep the best in a file of paths
  serve     answer the Open Inference Protocol over HTTP, each query on the path that suits it
  load      send a server queries at random times and say how it answered
  simulate  run the scheduler on measured or recorded paths without computing anything

`COMMAND --help` lists its settings; lists are written key=[a,b]."""

Say = Callable[[str], None]


class Command(NamedTuple):
    """Where a command's settings and work stand, below ``tightrec.serving``."""

    settings: str
    """``module:dataclass``."""

    work: str
    """``module:function``, which takes the settings and a function that prints a line, and returns the exit
    status."""


COMMANDS = {
    "explore": Command("explore.config:ExploreConfig", "explore.explorer:explore"),
    "serve": Command("server.config:ServeConfig", "server.serve:serve"),
    "load": Command("load.config:LoadClientConfig", "load.client:load"),
    "simulate": Command("scheduling.simulate_config:SimulateConfig", "scheduling.simulate:simulate_command"),
}
"""By name."""


def run(words: Sequence[str]) -> int:
    """Run one command; returns its exit status.

    Raises:
        ValueError: a mistake in the words or settings, a damaged file.
    """
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return DONE
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}. Known: {', '.join(COMMANDS)}.")
    settings = _found(COMMANDS[name].settings)
    if not rest or {"-h", "--help"} & set(rest):
        print(describe(name, settings), file=sys.stdout if rest else sys.stderr)
        return DONE if rest else MISTAKEN
    config = from_words(settings, rest, name)
    # As Ctrl-C does, so that what is half-written is removed; a command may set a handler of its own.
    signal.signal(signal.SIGTERM, _terminated)
    return _found(COMMANDS[name].work)(config, say)


def say(line: str) -> None:
    """Print a line at once, whatever stdout is."""
    print(line, flush=True)


def _found(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(f"tightrec.serving.{module}"), name)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
