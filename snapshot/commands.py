"""The commands of ``python -m tightrec.snapshot``."""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tightrec.formats.command import DONE, FAILED, MISTAKEN
from tightrec.formats.settings import from_words
from tightrec.formats.usage import describe
from tightrec.snapshot import store
from tightrec.snapshot.compiled import CompileConfig, compile_snapshot
from tightrec.snapshot.config import ExportConfig
from tightrec.snapshot.debugger import DebugConfig, debug
from tightrec.snapshot.export import Exported, export
from tightrec.snapshot.watch import WatchConfig, watch

USAGE = """\
python -m tightrec.snapshot COMMAND key=value ...

  export   make a low-precision snapshot of a checkpoint, verify it against float32, publish it
  watch    make a snapshot of every new checkpoint of a run; OUT/current is the newest verified one
  show     check every file of a snapshot and print what it holds
  debug    run float32 and low precision side by side and name where the error enters
  compile  write a snapshot as one torch.export or TorchScript file

`COMMAND --help` lists its settings."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """``show``: what a snapshot holds."""

    snapshot: Path
    """A snapshot's folder."""


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
    settings, carry_out = COMMANDS[name]
    if not rest or {"-h", "--help"} & set(rest):
        print(describe(name, settings), file=sys.stdout if rest else sys.stderr)
        return DONE if rest else MISTAKEN
    config: Any = from_words(settings, rest, name)
    if getattr(config, "threads", None):
        torch.set_num_threads(config.threads)
    # As Ctrl-C does, so that what is half-written is removed.
    signal.signal(signal.SIGTERM, _terminated)
    return carry_out(config)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def say(line: str) -> None:
    """Print a line at once, whatever stdout is."""
    print(line, flush=True)


def _export(config: ExportConfig) -> int:
    done = export(config, say)
    for line in _summary(done):
        say(line)
    refused = done.verification is not None and not done.verification.passed
    if refused:
        print(
            f"error: the snapshot loses more than budget_ne={config.budget_ne:g} allows: nothing was "
            "published. Give precision=auto, which keeps what is sensitive wider, or a larger budget; "
            "`debug` with the same settings shows where the error enters.",
            file=sys.stderr,
        )
        return FAILED
    say(f"snapshot {done.path}")
    return DONE


def _summary(done: Exported) -> list[str]:
    lines = [done.plan.counts]
    verdict = done.verification
    lines.append(verdict.sentence if verdict else "not verified, as verify=false asks")
    return lines


def _show(config: ShowConfig) -> int:
    # Resolved once: a watcher may move its link meanwhile.
    folder = config.snapshot.resolve()
    manifest = store.read_manifest(folder)
    store.check(folder, manifest)
    size = sum(record.size_bytes for record in manifest.files.values())
    say(f"{config.snapshot}: step {manifest.step}, {size:,} bytes in {len(manifest.files)} files, all intact")
    for table in manifest.tables:
        say(f"  {table.name:<20} {table.kind:<5} {table.rows:>13,} x {table.dim}")
    for name, layer in manifest.layers.items():
        say(f"  {name:<20} {layer.kind}")
    verdict = manifest.verification
    say(_verdict(verdict) if verdict else "not verified")
    return DONE


def _verdict(verification: dict[str, Any]) -> str:
    from tightrec.snapshot.verify import Verification

    if None in (verification["ne_loss"], *verification["snapshot"].values()):
        return "REFUSED: its scores are not numbers"
    return Verification(**verification).sentence


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "export": (ExportConfig, _export),
    "watch": (WatchConfig, lambda config: watch(config, say)),
    "show": (ShowConfig, _show),
    "debug": (DebugConfig, lambda config: debug(config, say)),
    "compile": (CompileConfig, lambda config: compile_snapshot(config, say)),
}
"""The settings of each command, and what carries it out."""
