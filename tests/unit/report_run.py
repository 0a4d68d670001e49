"""A small run as the trainer would tell it, for the tests of console, records and page."""

import dataclasses
import io
import math
from pathlib import Path

from rich.console import Console

from tightrec.models.scores import Scores
from tightrec.trainer.report.config import LoggingConfig
from tightrec.trainer.report.run_log import RunLog
from tightrec.trainer.step_split import TimeSplit

SCORES = Scores(rows=900, log_loss=0.41, ne=0.85, auc=0.791, calibration=1.01, base_rate=0.25)
QUIET = LoggingConfig(tensorboard=False, plain_every_s=0)
PLAN = {
    "table": "t_<city>",
    "type": "row_wise",
    "ranks": [0, 1],
    "rows": 1000,
    "dim": 16,
    "memory_bytes": 64_000,
    "predicted_bytes_per_step": 2_000,
}


def captured(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def describe(log: RunLog) -> None:
    config = {"name": "trial", "seed": 7, "model": {"embedding_dim": 16, "top_layers": [8]}, "resume": None}
    log.describe(
        config=config, world=2, device="cpu", plan=[PLAN], rows={"train": 9000}, parameters_rank0=123
    )


def train(log: RunLog, step: int, loss: float = 0.5, split: TimeSplit | None = None) -> None:
    log.train(
        step=step,
        rows=4096,
        loss=loss,
        ne=0.9,
        rows_per_s=1234.0,
        learning_rate_factor=1.0,
        input_bytes=100.0,
        forward_bytes=2_000.0,
        backward_bytes=3_000.0,
        split=split,
    )


def finish(log: RunLog) -> None:
    log.finish(
        status="finished",
        scores={"test": dataclasses.asdict(SCORES)},
        bayes_auc={"test": 0.8},
        steps=2,
        rows_per_s=1234.0,
        bytes_per_step={"input": 100.0, "forward": 2_000.0, "backward": 3_000.0},
        checkpoint="checkpoints/step-2",
    )


def whole_run(folder: Path, console: Console | None = None) -> None:
    with RunLog(folder, 0, QUIET, console or captured()) as log:
        describe(log)
        log.begin_epoch(epoch=0, epochs=2, step=0, steps=2)
        log.warn("two tables <are> replicated")
        train(log, 1)
        train(log, 2, math.nan, split=TimeSplit(data=1.0, dense=4.0))
        log.evaluation("test", 2, SCORES)
        finish(log)
