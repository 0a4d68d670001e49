"""One training job from configuration to report: connect, build, resume, train, close."""

import dataclasses
import fnmatch
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tightrec.formats.checkpoint_files import find_checkpoints, latest_complete
from tightrec.formats.columns import Source
from tightrec.formats.run_folder import CHECKPOINTS, FINISHED
from tightrec.sharding.obituary import ExchangeError, last_words
from tightrec.sharding.plan_table import plan_json, plan_text
from tightrec.sharding.traffic import counted_traffic
from tightrec.trainer.build import Built, build_task, open_sources
from tightrec.trainer.checkpoint import Checkpointer
from tightrec.trainer.config import JobConfig, unused_settings, write_record
from tightrec.trainer.control import Control, StopRequest, stop_on_signals
from tightrec.trainer.data.loader import Loader
from tightrec.trainer.data.shards import Position
from tightrec.trainer.data.synthetic import SyntheticSource
from tightrec.trainer.exchange_watch import ExchangeWatch
from tightrec.trainer.handover import description, hand_over, held_out, point_latest
from tightrec.trainer.idle import idle_settings
from tightrec.trainer.loop import Outcome, Progress, Trainer
from tightrec.trainer.noise import hush
from tightrec.trainer.pipeline import build_pipeline
from tightrec.trainer.ranks import Ranks, connected
from tightrec.trainer.report.run_log import RunLog
from tightrec.trainer.resume_check import other_representation
from tightrec.trainer.timing import StepProfiler
from tightrec.trainer.trace import StepTrace


def run(config: JobConfig, plain: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Run the job on this rank; returns 0 when it finished or was stopped with its state saved.

    Raises:
        ValueError: a user's mistake that shows only while building.
        NotANumber: the loss left the numbers.
    """
    hush()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.use_deterministic_algorithms(config.debug.deterministic)
    with ExitStack() as stack:
        ranks = stack.enter_context(connected(config.train.device, config.train.timeout_s))
        folder, checkpoint = _folders(config, ranks)
        stack.enter_context(_traced_failure(folder, ranks))
        stack.enter_context(_explained())
        request = stack.enter_context(stop_on_signals())
        log = stack.enter_context(RunLog(folder, ranks.rank, config.logging))
        for sentence in unused_settings(config, overrides):
            log.warn(sentence)
        if ranks.world == 1 and (config.codec.forward, config.codec.backward) != ("none", "none"):
            log.warn("With one rank nothing is exchanged, so the codec changes nothing.")
        sources = open_sources(config.data)
        schema = sources["train"].schema
        built = build_task(config, ranks, schema)
        if checkpoint is not None:
            refusal = other_representation(checkpoint, config.model, schema) if ranks.rank == 0 else None
            refusal = ranks.from_first(refusal)
            if refusal:
                raise ValueError(refusal)
        # Only now, so that words that are refused are not repeated when the run is resumed without them.
        if ranks.rank == 0:
            write_record(folder, plain, overrides)
        if "valid" not in sources:
            log.warn("the data has no valid split, so nothing is evaluated before the end.")
        for sentence in idle_settings(overrides, sources, tables=bool(built.plan)):
            log.warn(sentence)
        _describe(config, plain, ranks, folder, built, sources, log)
        if config.debug.dry_run:
            log.say("dry run: stopped before the first step")
            return 0
        if ranks.rank == 0:
            _point_latest(folder, log)
        outcome = _train(config, ranks, folder, checkpoint, built, sources, request, log)
        reason = None
        if outcome.status == "stopped":
            reason = f"stopped by {request.signal_name or 'a signal to another rank'}"
            log.say(f"{reason}; resume={folder} goes on")
        _close(outcome, reason, folder, sources, log)
    # Last, so that a job that fails hands nothing over.
    if ranks.rank == 0 and outcome.status == FINISHED:
        hand_over(folder)
    return 0


def _train(
    config: JobConfig,
    ranks: Ranks,
    folder: Path,
    checkpoint: Path | None,
    built: Built,
    sources: dict[str, Source],
    request: StopRequest,
    log: RunLog,
) -> Outcome:
    # Equal bags save lookups and exchange; distinct ids are the deep hash embeddings' own business.
    dedup = config.codec.dedup and bool(built.plan)
    loaders = {split: _loader(config, source, split, ranks, dedup) for split, source in sources.items()}
    checkpointer = Checkpointer(folder / CHECKPOINTS, config.train.checkpoint)
    progress = Progress(step=0, position=loaders["train"].start(0))
    exchange = ExchangeWatch(built.steering, built.task, built.plain_plan, ranks, log)
    if checkpoint is not None:
        extra = checkpointer.load(checkpoint, {"model": built.task, "optimizer": built.optimizer})
        progress = Progress(
            step=extra["step"],
            position=Position.from_dict(extra["position"]),
            evaluation_due=extra["evaluation_due"],
        )
        exchange.restore(extra.get("exchange"))
        log.say(f"resumed after step {progress.step} from {checkpoint}")
    agreement = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.train.timeout_s))
    trace = StepTrace(folder, ranks.rank, config.debug.trace_step)
    data = ranks.from_first(_held_out(config, sources, folder, log) if ranks.rank == 0 else None)
    with (
        counted_traffic() as traffic,
        torch.autograd.set_detect_anomaly(config.debug.detect_anomaly),
    ):
        trainer = Trainer(
            config=config.train,
            ranks=ranks,
            task=built.task,
            optimizer=built.optimizer,
            pipeline=build_pipeline(config.train.pipeline, built.task, built.optimizer, ranks.device),
            learning_rate=built.learning_rate,
            loaders=loaders,
            control=Control(agreement, config.train.agree_every, request),
            checkpointer=checkpointer,
            traffic=traffic,
            exchange=exchange,
            profiler=StepProfiler(config.logging.split_every, ranks.device),
            trace=trace,
            log=log,
            about=description(config.model, sources["train"].schema, data),
        )
        outcome = trainer.fit(progress)
    # Not where training failed: a save still under way would wait there for ranks that are gone.
    checkpointer.close()
    if not trace.close():
        log.warn(
            f"debug.trace_step={config.debug.trace_step}: there was no such step, so no trace was written."
        )
    return outcome


def _loader(config: JobConfig, source: Source, split: str, ranks: Ranks, dedup: bool) -> Loader:
    settings = dataclasses.replace(
        config.data.loader,
        seed=config.seed,
        shuffle=config.data.loader.shuffle and split == "train",
    )
    return Loader(
        source,
        settings,
        ranks.rank,
        ranks.world,
        pin_memory=ranks.device.type == "cuda",
        dedup=dedup,
    )


def _folders(config: JobConfig, ranks: Ranks) -> tuple[Path, Path | None]:
    """The run's folder, the same on every rank, and the checkpoint to resume from."""
    if config.resume is None and config.run_folder is None:
        return Path(ranks.from_first(_new_folder(config.name) if ranks.rank == 0 else None)), None
    given = Path(config.resume if config.resume not in (None, "auto") else config.run_folder or "")
    if any(part.is_symlink() for part in (given, *given.parents)):
        # A link such as runs/latest moves when another job starts.
        given = given.resolve()
    if given.parent.name == CHECKPOINTS:
        return given.parent.parent, given
    # Damage shows when the newest is loaded, which names the file and the checkpoint before it.
    saved = ranks.from_first(find_checkpoints(given / CHECKPOINTS))
    if config.resume is None and saved:
        raise ValueError(
            f"run_folder={given} already holds the checkpoint {saved[-1].name}. Continue it with "
            f"resume={given}, or give another folder."
        )
    if config.resume not in (None, "auto") and not saved:
        raise ValueError(
            f"resume={given}: there is no complete checkpoint in {given / CHECKPOINTS}. Start the job "
            "afresh, without resume."
        )
    return given, saved[-1] if saved else None


def _new_folder(name: str) -> str:
    """Make a folder of the present second, with a number behind it where one is taken."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count(1):
        folder = Path(f"runs/{name}/{stamp}{f'_{number}' if number > 1 else ''}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return str(folder)
    raise AssertionError("count() never ends")


def _point_latest(folder: Path, log: RunLog) -> None:
    try:
        point_latest(folder)
    except OSError as error:
        log.warn(f"runs/latest could not be made ({error}); training goes on without it.")


def _held_out(config: JobConfig, sources: dict[str, Source], folder: Path, log: RunLog) -> str | None:
    prepared = config.data.path if config.data.source == "parquet" else None
    try:
        return held_out(sources, prepared, folder)
    except OSError as error:
        log.warn(f"held-out rows could not be written into {folder} ({error}); checkpoints name none.")
        return None


def _describe(
    config: JobConfig,
    plain: Mapping[str, Any],
    ranks: Ranks,
    folder: Path,
    built: Built,
    sources: dict[str, Source],
    log: RunLog,
) -> None:
    parameters = sum(p.numel() for p in built.task.parameters())
    rows = {split: sum(source.row_counts) for split, source in sources.items()}
    log.describe(
        config=plain,
        world=ranks.world,
        device=str(ranks.device),
        plan=plan_json(built.plan),
        rows=rows,
        parameters_rank0=parameters,
        size=built.size.to_json(),
    )
    if ranks.rank == 0:
        (folder / "plan.json").write_text(json.dumps(plan_json(built.plan), indent=1) + "\n")
    counts = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    log.say(f"run folder {folder}")
    log.say(
        f"{ranks.world} rank(s) on {ranks.device.type}; codec {config.codec.forward} forward, "
        f"{config.codec.backward} backward; rows: {counts}"
    )
    log.say(built.size.words())
    log.say(plan_text(built.plan) if built.plan else "no feature has a table, so nothing is exchanged")
    wanted = config.sharding.type
    moved = [r.table for r in built.plan if r.type != wanted and r.table not in _overridden(config, built)]
    if wanted != "auto" and moved:
        log.warn(
            f"{len(moved)} table(s) ({_some(moved)}) have too few rows for {wanted}: "
            "they are table_wise instead."
        )
    replicated = [row.table for row in built.plan if row.type == "data_parallel"]
    if replicated:
        log.warn(
            f"{len(replicated)} data-parallel table(s) ({_some(replicated)}) are trained by optimizer.dense, "
            "not optimizer.tables, and are not exchanged."
        )


def _overridden(config: JobConfig, built: Built) -> set[str]:
    """Tables that sharding.tables gives a type of their own."""
    names = [row.table for row in built.plan]
    return {name for pattern in config.sharding.tables for name in fnmatch.filter(names, pattern)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _close(
    outcome: Outcome, reason: str | None, folder: Path, sources: dict[str, Source], log: RunLog
) -> None:
    best: dict[str, float] = {}
    for split, source in sources.items():
        if log.first and isinstance(source, SyntheticSource) and split in outcome.scores:
            best[split] = source.bayes_auc()
    steps = max(1, outcome.steps)
    log.finish(
        status=outcome.status,
        reason=reason,
        scores={split: dataclasses.asdict(scores) for split, scores in outcome.scores.items()},
        bayes_auc=best,
        steps=outcome.steps,
        rows_per_s=outcome.rows / outcome.seconds if outcome.seconds else None,
        bytes_per_step={purpose: count / steps for purpose, count in outcome.sent_bytes.items()},
        checkpoint=str(latest_complete(folder / CHECKPOINTS) or ""),
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Tell the other ranks why this one ends, or find out why they did."""
    try:
        yield
    except Exception as error:
        words = last_words(error)
        if words is None:
            raise
        raise ExchangeError(words) from error


@contextmanager
def _traced_failure(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep the traceback of a failure in the run folder; of those in words the console gets no more."""
    try:
        yield
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with (folder / f"error-rank{ranks.rank}.log").open("a") as file:
            file.write(f"{stamp}\n{traceback.format_exc()}\n")
        error.add_note(f"(traceback in {folder}/error-rank{ranks.rank}.log)")
        raise
