"""Many runs in one job: each codec, or each representation, with each seed, one after the other in the same
processes.

Started again with the same words and ``run_folder``, the job leaves out what is finished and goes on where it
was stopped.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tightrec.trainer.compare.comparison import compare
from tightrec.trainer.compare.config import PLAIN, AbConfig
from tightrec.trainer.compare.runs import comparable, differing
from tightrec.trainer.config import JobConfig, load
from tightrec.trainer.control import stop_on_signals
from tightrec.trainer.ranks import connected
from tightrec.trainer.report.records import RUN_FILE, finite, read_run

RunOne = Callable[[JobConfig, dict[str, Any], Sequence[str]], int]

COMPARISON_FILE = "comparison.html"
_OURS = {
    "seed": "ab.seeds names the seeds",
    "resume": "run_folder names the folder to go on in",
}
"""Words that each run is given by the job itself, and what stands in their place; beside them the word of the
group that ``ab`` varies."""

_MOST_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One run to make."""

    folder: Path
    config: JobConfig
    plain: dict[str, Any]
    words: Sequence[str]


def run_all(config: JobConfig, words: Sequence[str], run_one: RunOne) -> int:
    """Make every run of ``config.ab`` on this rank, then compare them on rank 0; a collective.

    Args:
        config: the job's, with at least one codec or representation in ``ab``.
        words: the overrides that made it.
        run_one: makes one run, as :func:`tightrec.trainer.job.run` does.

    Returns:
        0 once all is done, or when the job was stopped with its state saved; else what ``run_one`` returned.

    Raises:
        ValueError: words that the job sets itself, a codec or representation that does not exist, an earlier
            run of other settings in the same folder, or what ``run_one`` refuses; the last ones with the
            run's name.
    """
    _refuse_ours(config.ab, words)
    with stop_on_signals() as request:
        with connected(config.train.device, config.train.timeout_s) as ranks:
            folder = Path(ranks.from_first(_folder(config) if ranks.rank == 0 else None))
            jobs = _jobs(config, words, folder)
            # Only rank 0 is sure to see the files.
            done = ranks.from_first(_done(jobs, ranks.world) if ranks.rank == 0 else None)
            first = ranks.rank == 0
        if isinstance(done, str):
            raise ValueError(done)
        for number, job in enumerate(jobs, start=1):
            told = f"run {number} of {len(jobs)}, {job.folder.name}"
            if first:
                print(f"{told}{': finished before' if done[number - 1] else ''}", flush=True)
            if done[number - 1]:
                continue
            status = _made(job, told, run_one)
            if status:
                return status
            with connected(config.train.device, config.train.timeout_s) as ranks:
                asked = any(ranks.gather(request.signal_name is not None))
                finished = ranks.from_first(_is_finished(job) if first else None)
            if asked or not finished:
                if first:
                    print(f"stopped in {told}; the same words with run_folder={folder} go on", flush=True)
                return 0
    if first:
        compare([job.folder for job in jobs], folder / COMPARISON_FILE)
    return 0


def _refuse_ours(ab: AbConfig, words: Sequence[str]) -> None:
    ours = {**_OURS, ab.varied.removesuffix("s"): f"ab.{ab.varied} names the {ab.varied}"}
    if ab.varied == "representations":
        # A value overrides what the group chose: every run would have the same kind under another name.
        ours |= dict.fromkeys(("model.representation", "model.representation.kind"), ours["representation"])
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key in ours and word != "resume=auto":
            raise ValueError(f"{word} does not go with ab.{ab.varied}: {ours[key]}. Leave it out.")


def _folder(config: JobConfig) -> str:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return config.run_folder or f"runs/{config.name}/{stamp}"


def _jobs(config: JobConfig, words: Sequence[str], folder: Path) -> list[_Job]:
    """Every run; a mistake in the words of the last shows before the first starts."""
    ab = config.ab
    if len(ab.variants) * len(ab.seeds) < 2:
        raise ValueError(
            f"ab.{ab.varied} and ab.seeds make a single run, with nothing to compare it to. Add one."
        )
    kept = [word for word in words if not word.startswith(("run_folder=", "resume=", "ab."))]
    composed = {variant: _composed(ab, variant, kept) for variant in ab.variants}
    return [
        _job(folder / f"{variant}_{seed}", seed, *composed[variant])
        for seed in ab.seeds
        for variant in ab.variants
    ]


def _composed(ab: AbConfig, variant: str, kept: Sequence[str]) -> tuple[JobConfig, dict[str, Any], list[str]]:
    own = [f"{ab.varied.removesuffix('s')}={variant}"]
    if ab.varied == "codecs" and variant == PLAIN:
        own = ["codec=none", "codec.dedup=false"]
    words = [*kept, *own, f"ab.{ab.varied}=[]"]
    try:
        return *load(words), words
    except ValueError as error:
        error.add_note(f"(in the run {variant} of ab.{ab.varied})")
        raise


def _job(folder: Path, seed: int, config: JobConfig, plain: Mapping[str, Any], words: Sequence[str]) -> _Job:
    own = {"seed": seed, "run_folder": str(folder), "resume": "auto"}
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return _Job(
        folder=folder,
        config=dataclasses.replace(config, seed=seed, run_folder=str(folder), resume="auto"),
        plain={**plain, **own},
        words=[*words, f"seed={seed}", f"run_folder='{quoted}'", "resume=auto"],
    )


def _done(jobs: Sequence[_Job], world: int) -> list[bool] | str:
    """Which runs are finished, or the sentence about one that is not what it is taken for."""
    for job in jobs:
        if not (job.folder / RUN_FILE).is_file():
            continue
        try:
            before = read_run(job.folder)
        except ValueError as error:
            return str(error)
        # A run that ended before it was described has no configuration.
        if not before.get("config"):
            continue
        then = {**comparable(before["config"]), "ranks": str(before.get("world"))}
        now = {**comparable(finite(job.plain)), "ranks": str(world)}
        odd = differing(now, then)
        if odd:
            told = "; ".join(f"{key} was {then.get(key)}, is {now.get(key)}" for key in odd[:_MOST_TOLD])
            return (
                f"{job.folder} was begun with other settings ({told}), so it cannot be part of this "
                "comparison. Give those settings, or another run_folder."
            )
    return [_is_finished(job) for job in jobs]


def _is_finished(job: _Job) -> bool:
    return (job.folder / RUN_FILE).is_file() and read_run(job.folder).get("status") == "finished"


def _made(job: _Job, told: str, run_one: RunOne) -> int:
    try:
        return run_one(job.config, job.plain, job.words)
    except Exception as error:
        error.add_note(f"(in {told}; the same words with run_folder={job.folder.parent} go on there)")
        raise
    finally:
        # Modules refer to themselves in cycles: without this, tables of several runs are alive at once.
        gc.collect()
