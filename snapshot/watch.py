"""Every new checkpoint of a training run becomes a verified snapshot; see :mod:`tightrec.snapshot.current`.

newest checkpoint ──► types of the snapshot before, ranges measured anew ──► verified? ──► OUT/step-N
                                                              │ no                           ▲  │
                                                              ▼                              │  ▼
                                                 types searched on this checkpoint ──► verified?  current
                                                                                             │ no
                                                                                             ▼
                                                                                 OUT/rejected/step-N
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tightrec.formats import checkpoint_files as files
from tightrec.formats.command import DONE, FAILED
from tightrec.formats.run_folder import CHECKPOINTS, FINISHED, RUN_FILE
from tightrec.snapshot import current, store
from tightrec.snapshot.config import PrecisionConfig
from tightrec.snapshot.export import Material, Say, build, choose, gather
from tightrec.snapshot.manifest import plain
from tightrec.snapshot.plans import AUTO, FORCED, forced_plan
from tightrec.snapshot.precision import Plan
from tightrec.snapshot.source import Checkpoint, open_checkpoint
from tightrec.snapshot.verify import Verification

_BROKEN = (ValueError, OSError, SafetensorError, MemoryError, RuntimeError, EOFError)
"""What a checkpoint or the disk can do to us; anything else is a fault of this program and ends it."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig(PrecisionConfig):
    """``watch``: every new checkpoint of a run becomes a snapshot. ``precision`` is what the first one has;
    where a snapshot breaks ``budget_ne``, types are searched on its checkpoint, and kept from then on."""

    run: Path
    """A run's folder; it need not exist yet."""

    out: Path
    """Folder of the snapshots and of the link ``current``; kept by one watcher at a time."""

    poll_s: float = 10.0
    """Seconds between two looks at the run."""

    keep: int = 3
    """Snapshots to keep, what ``current`` points at included; and as many rejected ones."""

    once: bool = False
    """Do what there is to do now, and end."""

    follow: bool = False
    """Go on after the run has finished, since it may be resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.poll_s > 0:
            raise ValueError(f"poll_s={self.poll_s} must be above 0.")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1.")
        if self.precision not in (AUTO, *FORCED) and not Path(self.precision).is_file():
            raise ValueError(
                f"precision={self.precision} is neither a file nor one of {AUTO}, {', '.join(FORCED)}."
            )


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A plan that was tried on a checkpoint."""

    origin: str
    """Where the plan came from, in words."""

    plan: Plan
    """Its types."""

    verification: Verification
    """What came of it."""


def watch(config: WatchConfig, say: Say) -> int:
    """Keep ``config.out`` up to date with ``config.run`` until the run has finished; the exit status.

    0: the run's newest checkpoint has a verified snapshot. 1: it has none. Ctrl-C and SIGTERM end it at once,
    as they end every command; what was half-written is removed, now or by the next watcher.

    Raises:
        ValueError: another watcher keeps ``out``, or what is there is not what a watcher leaves.
    """
    out = config.out.resolve()
    with current.locked(out):
        return _Watcher(config, out, say).watch()


class _Watcher:
    def __init__(self, config: WatchConfig, out: Path, say: Say) -> None:
        self._config = config
        self._out = out
        self._say = say
        self._run: Path | None = None
        # Fingerprints of checkpoints that this process does not try again; and of those among them that only
        # the disk kept from becoming a snapshot, as it would keep older ones.
        self._given_up: set[str] = set()
        self._no_room: set[str] = set()
        self._told: set[str] = set()

    def watch(self) -> int:
        self._recover()
        while True:
            # Before the checkpoints: a run that has finished has saved its last one.
            finished = self._has_finished()
            if self._turn():
                continue
            if self._config.once or (finished and not self._config.follow):
                return self._end()
            time.sleep(self._config.poll_s)

    def _recover(self) -> None:
        """Put in order what a watcher before left."""
        current.tidy(self._out)
        for path, problem in current.find_unreadable(self._out):
            report = {"checkpoint": None, "why": [f"damaged on disk: {problem}"]}
            aside = current.set_aside(self._out, path, path.name, report)
            self._say(f"warning: {path.name} is damaged ({problem}) and was moved to {aside}")
        verified = current.find_verified(self._out)
        if verified:
            if current.point(self._out, verified[-1].path):
                self._say(f"{self._link} pointed elsewhere and points at {verified[-1].path.name} now")
        elif current.unlink_dangling(self._out):
            self._say(f"{self._link} pointed nowhere and was removed, for there is no verified snapshot")
        current.retire(self._out, self._config.keep)

    @property
    def _link(self) -> Path:
        return self._config.out / current.CURRENT

    def _turn(self) -> bool:
        """Deal with the newest checkpoint that nothing was done about; whether there was one."""
        done = {kept.note.get("checkpoint") for kept in current.find_verified(self._out)}
        rejected = self._rejected()
        for path in reversed(self._checkpoints()):
            fingerprint = _fingerprint(path)
            if fingerprint is None:
                if path.is_dir():
                    self._say_once(f"warning: {path.name} is passed over: its manifest cannot be read")
                continue
            if fingerprint in done | self._no_room:
                return False
            if fingerprint not in rejected | self._given_up:
                # Whatever comes of it, but first: what is tried for ever is never got past.
                self._given_up.add(fingerprint)
                return self._deal_with(path, fingerprint)
        return False

    def _deal_with(self, path: Path, fingerprint: str) -> bool:
        try:
            self._snapshot(open_checkpoint(path))
        except _BROKEN as error:
            return self._explain(path, fingerprint, error)
        return True

    def _snapshot(self, checkpoint: Checkpoint) -> None:
        config, name = self._config, checkpoint.path.name
        material = gather(checkpoint, config, verified=True)
        asked = self._asked(material)
        path = current.free_name(self._out, name)
        partial = store.partial_of(path)
        why: list[str] = []
        try:
            plan, origin, found = self._first_plan(material, asked)
            attempts = [_attempt(origin, plan, build(material, plan, found, partial, config, verified=True))]
            if not attempts[0].verification.passed and found is None:
                self._say(f"{name}, {origin}: {attempts[0].verification.sentence}; other types are searched")
                try:
                    attempts += self._search(material, plan, partial)
                except ValueError as error:
                    why.append(f"no other types could be searched: {error}")
            last = attempts[-1]
            if last.verification.passed:
                self._publish(checkpoint, partial, path, last, asked)
            else:
                why = [*(f"{a.origin}: {a.verification.sentence}" for a in attempts), *why]
                tried = [dataclasses.asdict(attempt) for attempt in attempts]
                aside = self._set_aside(partial, checkpoint.path, checkpoint.fingerprint, why, tried)
                self._say(f"{name}, {last.origin}: {last.verification.sentence}; {aside}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _first_plan(self, material: Material, asked: Mapping[str, Any]) -> tuple[Plan, str, Any]:
        """A plan, where it is from, and the search if there was one."""
        verified = current.find_verified(self._out)
        if verified and verified[-1].note.get("asked") == asked:
            before = verified[-1].manifest.precision
            parts = material.parts
            if (before.tables.keys(), before.layers.keys()) == (parts.tables.keys(), parts.layers.keys()):
                return before, f"types of {verified[-1].path.name}", None
        plan, found = choose(material, self._config, self._say)
        return plan, "types searched" if found else f"types by precision={self._config.precision}", found

    def _search(self, material: Material, broken: Plan, partial: Path) -> list[Attempt]:
        """Search a plan and build its snapshot in place of the one in ``partial``; nothing if none is new.

        Raises:
            ValueError: there are no rows to search on.
        """
        searching = dataclasses.replace(self._config, precision=AUTO)
        if material.search_rows is None:
            material = gather(material.checkpoint, searching, verified=True)
        plan, found = choose(material, searching, self._say)
        if plan == broken:
            return []
        shutil.rmtree(partial)
        verification = build(material, plan, found, partial, searching, verified=True)
        return [_attempt("types searched", plan, verification)]

    def _publish(
        self, checkpoint: Checkpoint, partial: Path, path: Path, attempt: Attempt, asked: Mapping[str, Any]
    ) -> None:
        note = {
            "number": current.next_number(self._out),
            "checkpoint": checkpoint.fingerprint,
            "asked": asked,
            "types": attempt.origin,
        }
        current.add(partial, path, note)
        current.point(self._out, path)
        self._say(
            f"{checkpoint.path.name}, {attempt.origin}: {attempt.verification.sentence}; "
            f"{self._link} points at {path.name}"
        )
        try:
            current.retire(self._out, self._config.keep)
        except OSError as error:
            self._say(f"warning: old snapshots could not be deleted: {error}")
        done = {kept.note.get("checkpoint") for kept in current.find_verified(self._out)}
        for older in self._checkpoints():
            known = _fingerprint(older)
            if older.name >= checkpoint.path.name or known in done | self._given_up | self._rejected():
                continue
            self._say_once(f"{older.name} is skipped, since {checkpoint.path.name} is newer")

    def _asked(self, material: Material) -> dict[str, Any]:
        """What the settings say of the plan: as long as it stays the same, types are carried on."""
        config = self._config
        if config.precision == AUTO:
            names = ("precision", "budget_ne", "row_search", "ranges")
            return {name: getattr(config, name) for name in names}
        return plain(forced_plan(config, list(material.parts.tables), list(material.parts.layers)))

    def _rejected(self) -> set[str]:
        """Fingerprints of checkpoints that did not verify under these very settings."""
        settings = self._settings()
        return {
            report["checkpoint"]
            for report in current.read_reports(self._out)
            if report.get("attempts") and report.get("settings") == settings
        }

    def _settings(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(PrecisionConfig) if field.name != "threads"]
        settings = {name: plain(getattr(self._config, name)) for name in names}
        if Path(self._config.precision).is_file():
            settings["precision"] = Path(self._config.precision).read_text(encoding="utf-8")
        return settings

    def _set_aside(
        self, folder: Path, path: Path, fingerprint: str, why: list[str], attempts: list[dict[str, Any]]
    ) -> str:
        """Keep ``folder``, what came of the checkpoint ``path``, with a report; returns where, in words."""
        report = {
            "source": path,
            "checkpoint": fingerprint,
            "why": why,
            "attempts": attempts,
            "settings": self._settings(),
        }
        aside = current.set_aside(self._out, folder, path.name, plain(report))
        current.retire(self._out, self._config.keep)
        target = current.target_of(self._out)
        stays = f"{self._link} stays at {target.name}" if target else f"there is no {self._link}"
        return f"it is kept in {self._config.out / aside.relative_to(self._out)}, {stays}"

    def _explain(self, path: Path, fingerprint: str, error: BaseException) -> bool:
        """Say in one line why a checkpoint did not become a snapshot; whether to try an older one."""
        name = path.name
        words = " ".join(str(error).split()) or type(error).__name__
        if not path.is_dir():
            self._say(
                f"warning: {name} was deleted while it was read; train.checkpoint.keep=N keeps N of them"
            )
            return True
        damage = error if isinstance(error, files.DamagedCheckpoint) else _damage(path)
        if damage is not None:
            self._say(f"warning: {name} is passed over, since it is damaged: {damage.problem}")
            return True
        if isinstance(error, OSError | SafetensorError | MemoryError):
            self._say(f"warning: {name} became no snapshot: {words}; the next checkpoint is tried again")
            self._no_room.add(fingerprint)
            return False
        try:
            folder = self._out / f"step-aside.partial-{fingerprint[:8]}"
            folder.mkdir()
            aside = self._set_aside(folder, path, fingerprint, [words], [])
        except OSError as failure:
            aside = f"no report could be written ({failure})"
        self._say(f"warning: {name} became no snapshot: {words}; {aside}")
        return True

    def _checkpoints(self) -> list[Path]:
        """Complete checkpoints of the run, oldest step first."""
        if self._run is None:
            if not self._config.run.is_dir():
                self._say_once(f"waiting for {self._config.run}, which is not there yet")
                return []
            # So that a link such as runs/latest means one run from here on, even if it is moved meanwhile.
            self._run = self._config.run.resolve()
            self._run = self._run.parent if self._run.name == CHECKPOINTS else self._run
            self._say(f"watching {self._run}, snapshots go to {self._config.out}")
        return files.find_checkpoints(self._run / CHECKPOINTS)

    def _has_finished(self) -> bool:
        self._checkpoints()
        if self._run is None:
            return False
        try:
            facts = json.loads((self._run / RUN_FILE).read_text(encoding="utf-8"))
            status, reason = facts.get("status"), facts.get("reason")
        except (OSError, ValueError, AttributeError):
            return False
        if status in ("stopped", "failed"):
            self._say_once(f"the run {status} ({reason}); waiting for it to be resumed")
        return status == FINISHED

    def _end(self) -> int:
        checkpoints = self._checkpoints()
        done = {kept.note.get("checkpoint") for kept in current.find_verified(self._out)}
        if not checkpoints:
            self._say(f"{self._config.run} has no complete checkpoint")
            return FAILED
        if _fingerprint(checkpoints[-1]) not in done:
            self._say(f"{checkpoints[-1].name}, the newest checkpoint, has no verified snapshot")
            return FAILED
        return DONE

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)


def _attempt(origin: str, plan: Plan, verification: Verification | None) -> Attempt:
    assert verification is not None, "a build that was asked to verify"
    return Attempt(origin=origin, plan=plan, verification=verification)


def _fingerprint(path: Path) -> str | None:
    """As in :class:`Checkpoint`; None: it is gone or has no readable manifest."""
    try:
        return hashlib.sha256((path / files.MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _damage(path: Path) -> files.DamagedCheckpoint | None:
    try:
        files.verify(path)
    except files.DamagedCheckpoint as damage:
        return damage
    except ValueError:
        return None
    return None
