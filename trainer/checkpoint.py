"""Saving and loading a job's state on any number of ranks, by torch.distributed.checkpoint.

A save is collective. In the background it copies the state to CPU memory first and then writes from a
thread, whose collectives run on a gloo group of its own beside training. See
:mod:`tightrec.formats.checkpoint_files` for what is on disk.
"""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.optim.keyed import KeyedOptimizer

from tightrec.formats import checkpoint_files as files
from tightrec.trainer import checkpoint_match as match
from tightrec.trainer.checkpoint_state import (
    Leaf,
    SnapshotPlanner,
    Stateful,
    initialise_optimizers,
    leaves_of,
    refuse_local_optimizer_state,
    shape_of,
)

T = TypeVar("T")


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written or read, for reasons outside the job; the message says which."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and how state is saved."""

    every_steps: int = 1000
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""

    keep: int = 3
    """Complete checkpoints to keep; older ones are deleted once a newer one is complete."""

    background: bool = True
    """Write from a thread while training goes on. Needs CPU memory for a copy of the rank's state."""

    timeout_s: float = 1800.0
    """How long a rank waits for the others while saving or loading."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"train.checkpoint.every_steps={self.every_steps} must be 0 or more.")
        if self.keep < 1:
            raise ValueError(f"train.checkpoint.keep={self.keep} must be at least 1.")
        if not self.timeout_s > 0:
            raise ValueError(f"train.checkpoint.timeout_s={self.timeout_s} must be above 0.")


class Checkpointer:
    """Saves a job's state into ``folder``, one save at a time, and loads it.

    Making one is collective and removes what a killed job left half-written.

    Args:
        folder: the checkpoints' own folder, on a file system that all ranks share.
        group: a gloo group used by nobody else; None: a new one over all ranks, or no group where
            torch.distributed is not initialised.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, group: dist.ProcessGroup | None = None
    ) -> None:
        if group is None and dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s))
        self.folder = folder
        self._config = config
        self._ranks = _Ranks(group)
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._ranks.first(lambda: files.tidy(folder))

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after ``step`` steps."""
        return self._config.every_steps > 0 and step % self._config.every_steps == 0

    def save(
        self, step: int, state: Mapping[str, Stateful], extra: Mapping[str, Any], wait: bool = False
    ) -> None:
        """Save ``state`` after ``step`` steps; collective. Waits for the save before it, if that still runs.

        Args:
            state: by name, objects with ``state_dict``: the (sharded) model, keyed optimizers.
            extra: JSON-able values, the same on every rank.
            wait: return only when the checkpoint is complete.

        Raises:
            ValueError: ``extra`` is not JSON, or state that cannot be saved.
            CheckpointFailed: the save before this one failed, or this one if it is waited for; on all ranks.
        """
        self.wait()
        try:
            kept = json.loads(json.dumps(dict(extra)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint of step {step}: extra must hold JSON values only ({error})."
            ) from None
        leaves = leaves_of({name: value.state_dict() for name, value in state.items()})
        refuse_local_optimizer_state(leaves)
        if wait or not self._config.background:
            planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            self._write(step, {name: leaf.value for name, leaf in leaves.items()}, planner, kept)
            self.wait()
        else:
            copies = SnapshotPlanner(leaves)
            # A daemon, so that a job that fails beside a save whose peers are gone can still end.
            self._thread = threading.Thread(
                target=self._write, args=(step, copies.state, copies, kept), name="checkpoint", daemon=True
            )
            self._thread.start()

    def wait(self) -> None:
        """Return when no save runs any more.

        Raises:
            CheckpointFailed: the last save failed; told once, on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure:
            raise CheckpointFailed(failure)

    def close(self) -> None:
        """Wait for the last save; call it before process groups are destroyed.

        Raises:
            RuntimeError: that save failed.
        """
        self.wait()

    def load(self, path: Path, state: Mapping[str, Stateful]) -> dict[str, Any]:
        """Load the checkpoint ``path`` into ``state``, in place; collective. See :func:`load_checkpoint`."""
        self.wait()
        return _load(path, state, self._ranks)

    def _write(
        self, step: int, state: dict[str, Any], planner: dcp.SavePlanner, extra: dict[str, Any]
    ) -> None:
        partial = files.partial_of(self.folder, step)
        try:
            self._ranks.first(lambda: files.make_partial(self.folder, step))
            self._ranks.together(lambda: _require_shared(partial))
            with _quiet(self._ranks):
                dcp.save(
                    state,
                    storage_writer=dcp.FileSystemWriter(partial),
                    planner=planner,
                    process_group=self._ranks.group,
                    no_dist=self._ranks.group is None,
                )
            own = f"__{self._ranks.rank}_*"
            names = [*partial.glob(own), *([partial / ".metadata"] if self._ranks.rank == 0 else [])]
            parts = self._ranks.together(lambda: {name.name: files.record_of(name) for name in names})
            manifest = files.Manifest(
                step=step,
                world=self._ranks.world,
                files={name: record for part in parts for name, record in part.items()},
                extra=extra,
                torch=torch.__version__,
            )
            self._ranks.first(lambda: files.publish(self.folder, manifest))
            self._ranks.first(lambda: files.retire(self.folder, step, self._config.keep))
        except (Exception, CheckpointException) as error:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            newest = files.latest_complete(self.folder)
            self._failure = (
                f"The checkpoint of step {step} could not be written into {self.folder}: {_words(error)}. "
                + (f"The newest complete one is {newest}." if newest else "There is no complete one.")
            )


def load_checkpoint(path: Path, state: Mapping[str, Stateful]) -> dict[str, Any]:
    """Load the checkpoint ``path`` into unsharded ``state`` of this process alone; returns its extra.

    Everything is verified and compared before anything is loaded. Names in the checkpoint whose first part
    is not in ``state`` are left out, so ``{"model": model}`` loads no optimizer. Number of ranks and
    sharding may differ from those that wrote it; see :mod:`tightrec.trainer.checkpoint_match` for
    optimizer state that cannot follow exactly.

    Raises:
        ValueError: no such checkpoint, or one that does not fit, with the tables and both shapes.
        DamagedCheckpoint: naming the file, and the checkpoint before it.
    """
    return _load(path, state, _Ranks(None))


class _Ranks:
    """The ranks of a group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.world = dist.get_world_size(group) if group else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` on every rank; its results in order of rank.

        Raises:
            CheckpointFailed: on every rank, if any rank's work raised.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = _words(error)
        outcomes = self.gather((result, failure))
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
        if failures:
            raise CheckpointFailed("; ".join(failures))
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def first(self, work: Callable[[], Any]) -> None:
        """Do ``work`` on rank 0 while the others wait."""
        self.together(lambda: (work(), None)[1] if self.rank == 0 else None)


def _load(path: Path, state: Mapping[str, Stateful], ranks: _Ranks) -> dict[str, Any]:
    manifest = _verified(path, ranks)
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    metadata.state_dict_metadata = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if name.partition(".")[0] in state
    }
    stored = match.stored_shapes(metadata)
    initialise_optimizers(state, stored)
    nested = {name: value.state_dict() for name, value in state.items()}
    leaves = leaves_of(nested)
    # A rank names only the optimizer state it holds, so what the job wants is known from all of them.
    wanted: dict[str, tuple[int, ...] | None] = {}
    for shapes in ranks.gather({name: shape_of(leaf.value) for name, leaf in leaves.items()}):
        wanted.update(shapes)
    conversions = match.plan_conversions(metadata, wanted)
    problems = match.mismatches(stored, wanted, conversions)
    if problems:
        raise ValueError(
            f"The checkpoint {path} does not fit this job: {'; '.join(problems)}. Use the data, model and "
            "optimizers that it was written with (sharding and number of ranks may differ), or start afresh."
        )
    _read(reader, metadata, leaves, conversions, manifest.step, ranks)
    for name, value in state.items():
        value.load_state_dict(nested[name])
        if isinstance(value, KeyedOptimizer) and hasattr(value, "set_optimizer_step"):
            # fbgemm's Adam corrects its bias by a counter that is in no state dict.
            value.set_optimizer_step(manifest.step)
    return manifest.extra


def _verified(path: Path, ranks: _Ranks) -> files.Manifest:
    manifest, damage, refusal = None, None, None
    try:
        manifest = files.read_manifest(path)
        damage = files.check_files(path, manifest, sorted(manifest.files)[ranks.rank :: ranks.world])
    except files.DamagedCheckpoint as error:
        damage = error.problem
    except ValueError as error:
        refusal = str(error)
    outcomes = ranks.gather((damage, refusal))
    for text in (text for _, text in outcomes if text):
        raise ValueError(text)
    for text in (text for text, _ in outcomes if text):
        raise files.DamagedCheckpoint(path, text)
    assert manifest is not None
    return manifest


def _read(
    reader: dcp.FileSystemReader,
    metadata: dcp.Metadata,
    leaves: dict[str, Leaf],
    conversions: dict[str, match.Conversion],
    step: int,
    ranks: _Ranks,
) -> None:
    """Read the checkpoint's tensors into the leaves, in place."""
    targets = {name: leaf.value for name, leaf in leaves.items() if name not in conversions}
    converted = {name: conversion for name, conversion in conversions.items() if name in leaves}
    for source in {c.source for c in converted.values() if c.source is not None}:
        entry = metadata.state_dict_metadata[source]
        targets[source] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        with _quiet(ranks):
            dcp.load(
                targets,
                storage_reader=reader,
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except CheckpointException as error:
        raise CheckpointFailed(f"The checkpoint {reader.path} could not be read: {_words(error)}.") from None
    for name, conversion in converted.items():
        target = leaves[name].value
        if conversion.source is None:
            target.fill_(step)
        else:
            match.convert(targets[conversion.source], target, leaves[conversion.weight].value, conversion)
    for name, leaf in leaves.items():
        if shape_of(leaf.value) is None:
            leaf.holder[leaf.key] = targets[name]


@contextmanager
def _quiet(ranks: _Ranks) -> Iterator[None]:
    """No warning about missing ranks where there is one process on purpose."""
    if ranks.group is not None:
        # Filters are global to the process: with a group there is nothing to hide from a thread.
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise RuntimeError(
            f"{folder}, which rank 0 made, is not to be seen here: the run folder must be on a file system "
            "that all machines share"
        )


def _words(error: BaseException) -> str:
    """An error as text without a traceback; of several ranks' errors, each rank's."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_words(failure[0])}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)
