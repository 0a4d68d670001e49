"""Everything a run tells while it lives and leaves behind when it ends; rank 0 alone speaks and writes."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console

from tightrec.compression.policy.config import Direction
from tightrec.models.scores import Scores
from tightrec.trainer.report.closing import final_table
from tightrec.trainer.report.config import LoggingConfig
from tightrec.trainer.report.console import ProgressConsole, Status
from tightrec.trainer.report.figures import figure
from tightrec.trainer.report.html import write_report
from tightrec.trainer.report.provenance import gpu, now, provenance
from tightrec.trainer.report.records import RUN_FILE, RecordFile, read_run, write_run
from tightrec.trainer.report.tensorboard import Scalars
from tightrec.trainer.step_split import TimeSplit, mean

Tables = Mapping[str, Mapping[str, Any]]

_EARLIER = ("command", "started", "ended", "status", "reason", "steps")


class RunLog:
    """Console, ``metrics.jsonl``, ``run.json``, TensorBoard and ``report.html`` of one run.

    To be used in a ``with``: whatever ends the block, records are on disk and ``run.json`` says how the run
    ended. Every method does nothing on other ranks than 0.

    Args:
        folder: the run's folder; made if absent, continued if it holds an earlier part of the same run.
        rank: of this process.
        config: what to write how often.
        console: where to print; None: standard output.
    """

    def __init__(
        self, folder: Path, rank: int, config: LoggingConfig, console: Console | None = None
    ) -> None:
        self.config = config
        self._folder = folder
        self.first = rank == 0
        """Whether this rank is the one that speaks and writes."""
        self._console = ProgressConsole(config.plain_every_s, console)
        self._status = Status()
        self._splits: list[TimeSplit] = []
        self._warned: set[str] = set()
        self._run: dict[str, Any] = {}
        self._compressed: dict[str, dict[str, float]] = {}

    def __enter__(self) -> Self:
        if self.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = {"status": "running", "reason": None, "started": now(), "ended": None, **provenance()}
            if (self._folder / RUN_FILE).is_file():
                before = read_run(self._folder)
                part = {key: before.get(key) for key in _EARLIER}
                self._run["earlier"] = [*before.get("earlier", []), part]
            write_run(self._folder, self._run)
            self._records = RecordFile(self._folder)
            self._scalars = Scalars(self._folder / "tensorboard") if self.config.tensorboard else None
            self._began_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.first:
            return
        self._console.close()
        self._records.close()
        if self._scalars is not None:
            self._scalars.close()
        if self._run["status"] == "running":
            if error is None:
                self._end(status="stopped", reason="ended without a result, as a dry run does")
            else:
                self._end(status="failed", reason=f"{type(error).__name__}: {error}")
                self._report_after_failure()

    def describe(
        self,
        *,
        config: Mapping[str, Any],
        world: int,
        device: str,
        plan: Sequence[Mapping[str, Any]],
        rows: Mapping[str, int],
        parameters_rank0: int,
        size: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what the run is, before it starts.

        Args:
            config: the whole configuration, as plain mappings.
            world: number of ranks.
            device: of rank 0.
            plan: a mapping a table, see :func:`tightrec.sharding.plan_table.plan_json`.
            rows: by split, all ranks together.
            parameters_rank0: values that rank 0 trains, its shards of tables included.
            size: of the whole model, see :class:`tightrec.trainer.model_size.ModelSize`.
        """
        if self.first:
            self._run |= {
                "name": config.get("name"),
                "seed": config.get("seed"),
                "world": world,
                "device": device,
                "gpu": gpu(device),
                "rows": dict(rows),
                "parameters_rank0": parameters_rank0,
                "size": dict(size or {}),
                "plan": [dict(row) for row in plan],
                "config": dict(config),
            }
            write_run(self._folder, self._run)

    def begin_epoch(self, *, epoch: int, epochs: int, step: int, steps: int) -> None:
        """Tell the progress line where the end is.

        Args:
            epoch: counted from 0.
            epochs: how many there will be.
            step: steps done before the epoch, or before this part of it.
            steps: steps left in the epoch.
        """
        self._status.epoch, self._status.epochs = epoch, epochs
        self._status.epoch_end, self._status.epoch_steps = step + steps, steps

    def say(self, text: str) -> None:
        """Print ``text``, above the progress line."""
        if self.first:
            self._console.say(text)

    def warn(self, text: str) -> None:
        """Print and record a warning; the same one only once."""
        if self.first and text not in self._warned:
            self._warned.add(text)
            self._console.say(f"warning: {text}", style="yellow")
            self._write({"kind": "warning", "step": self._status.step, "text": text})

    def train(
        self,
        *,
        step: int,
        rows: int,
        loss: float,
        ne: float,
        rows_per_s: float,
        learning_rate_factor: float,
        input_bytes: float,
        forward_bytes: float,
        backward_bytes: float,
        split: TimeSplit | None = None,
    ) -> None:
        """Record the steps since the last call.

        Args:
            step: steps done.
            rows: trained on in these steps, all ranks together, padding not counted.
            loss: mean log loss over the rows of these steps.
            ne: their normalised entropy.
            rows_per_s: all ranks together.
            learning_rate_factor: what the schedule multiplies learning rates by.
            input_bytes: ids sent between ranks in one step, all ranks together.
            forward_bytes: embeddings, likewise.
            backward_bytes: gradients of embeddings, likewise.
            split: mean time split of the steps sampled since the last call.
        """
        if not self.first:
            return
        measured = {
            "rows": rows,
            "loss": loss,
            "ne": ne,
            "rows_per_s": rows_per_s,
            "learning_rate_factor": learning_rate_factor,
            "input_bytes": input_bytes,
            "forward_bytes": forward_bytes,
            "backward_bytes": backward_bytes,
        }
        epoch = {"epoch": self._status.epoch} if self._status.epochs else {}
        self._write({"kind": "train", "step": step, **epoch, **measured})
        if split is not None:
            self._splits.append(split)
            self._write({"kind": "split", "step": step, **dataclasses.asdict(split), "total": split.total})
        self._status.step, self._status.loss, self._status.ne = step, loss, ne
        self._status.rows_per_s = rows_per_s
        self._status.bytes_per_step = input_bytes + forward_bytes + backward_bytes
        self._console.progress(self._status)

    def codec(
        self,
        *,
        step: int,
        direction: Direction,
        encode_ms: float | None,
        exchange_ms: float | None,
        decode_ms: float | None,
        plain_bytes: float,
        sent_bytes: float,
        multiplier: float,
        tables: Tables,
    ) -> None:
        """Record what compression did to one direction of the exchange since the last call.

        To be called before :meth:`train` of the same step, whose progress line tells the ratios.

        Args:
            step: steps done.
            encode_ms: mean of the sampled steps on this rank; None: none was sampled.
            exchange_ms: likewise.
            decode_ms: likewise.
            plain_bytes: what plain float32 would send in one step, all ranks together.
            sent_bytes: what was sent, sizes and headers counted, likewise.
            multiplier: what schedule and feedback scale the bounds by.
            tables: figures by table, see :mod:`tightrec.trainer.report.records`; the ratio is added here.
        """
        if not self.first:
            return
        total = self._compressed.setdefault(direction, {"windows": 0, "plain_bytes": 0, "sent_bytes": 0})
        for name, amount in (("windows", 1), ("plain_bytes", plain_bytes), ("sent_bytes", sent_bytes)):
            total[name] += amount
        ratio = _ratio(plain_bytes, sent_bytes)
        self._status.ratios[direction] = ratio
        record = {
            "kind": "codec",
            "step": step,
            "direction": direction,
            "encode_ms": encode_ms,
            "exchange_ms": exchange_ms,
            "decode_ms": decode_ms,
            "plain_bytes": plain_bytes,
            "sent_bytes": sent_bytes,
            "ratio": ratio,
            "multiplier": multiplier,
            "tables": {
                name: {**table, "ratio": _ratio(table["plain_bytes"], table["sent_bytes"])}
                for name, table in tables.items()
            },
        }
        self._write(record)

    def probe(
        self, *, step: int, total_dne: float, budget: float | None, multiplier: float, tables: Tables
    ) -> None:
        """Record a probe of what the bounds cost.

        Args:
            step: steps done.
            total_dne: by how much the NE rises by all tables' bounds together.
            budget: by how much it may rise; None: no budget is set.
            multiplier: what schedule and feedback scale the bounds by.
            tables: ``dne`` and ``bound`` by table.
        """
        if self.first:
            figures = {"total_dne": total_dne, "budget": budget, "multiplier": multiplier}
            self._write({"kind": "probe", "step": step, **figures, "tables": dict(tables)})

    def choice(
        self,
        *,
        step: int,
        direction: Direction,
        link_gb_s: float | None,
        plain: bool,
        tables: Tables,
        reason: str | None = None,
    ) -> None:
        """Record how each table is sent from here on, and why.

        Args:
            step: steps done.
            link_gb_s: the measured link; None: not measured.
            plain: whether the link is too fast to gain, so that float32 is sent.
            tables: ``mode``, ``reason``, ``predicted_ms`` and ``measured_ms`` by table.
            reason: why plain or compressed, with what was predicted of both.
        """
        if self.first:
            figures = {"direction": direction, "link_gb_s": link_gb_s, "plain": plain, "reason": reason}
            self._write({"kind": "choice", "step": step, **figures, "tables": dict(tables)})

    def evaluation(self, split: str, step: int, scores: Scores) -> None:
        """Record and print the scores of an evaluation on ``split`` after ``step`` steps."""
        if not self.first:
            return
        self._write({"kind": "eval", "step": step, "split": split, **dataclasses.asdict(scores)})
        self._status.auc = scores.auc
        told = (
            f"{split} after step {step:,}: AUC {figure(scores.auc)}  NE {figure(scores.ne)}  "
            f"log loss {figure(scores.log_loss)}  calibration {figure(scores.calibration, digits=3)}  "
            f"({scores.rows:,} rows)"
        )
        self.say(told)
        if scores.note:
            self.warn(f"{split} after step {step:,}: {scores.note}.")

    def finish(
        self,
        *,
        status: Literal["finished", "stopped"],
        scores: Mapping[str, Mapping[str, Any]],
        bayes_auc: Mapping[str, float],
        steps: int,
        rows_per_s: float | None,
        bytes_per_step: Mapping[str, float],
        checkpoint: str,
        reason: str | None = None,
    ) -> None:
        """Complete ``run.json``, write the report, print the closing table and where the report is.

        Args:
            status: whether training came to its end or was asked to stop.
            scores: last scores by split, the fields of :class:`Scores`.
            bayes_auc: the best AUC that any model could reach, by split, where it is known.
            steps: training steps of this process's life.
            rows_per_s: all ranks together, over all training steps.
            bytes_per_step: between ranks, all together, by purpose.
            checkpoint: path of the last one, or empty.
            reason: why it stopped.
        """
        if not self.first:
            return
        self._run |= {
            "steps": steps,
            "scores": {split: dict(values) for split, values in scores.items()},
            "bayes_auc": dict(bayes_auc),
            "rows_per_s": rows_per_s,
            "bytes_per_step": dict(bytes_per_step),
            "compression": {
                direction: {
                    "plain_bytes": total["plain_bytes"] / total["windows"],
                    "sent_bytes": total["sent_bytes"] / total["windows"],
                    "ratio": _ratio(total["plain_bytes"], total["sent_bytes"]),
                }
                for direction, total in self._compressed.items()
            },
            "time_split_ms": dataclasses.asdict(mean(self._splits)) if self._splits else None,
            "checkpoint": checkpoint or None,
        }
        self._console.close()
        self._end(status=status, reason=reason)
        self._console.show(final_table(self._run))
        self._console.say(f"report {write_report(self._folder)}")

    def _write(self, record: dict[str, Any]) -> None:
        self._records.write({**record, "time_s": round(time.monotonic() - self._began_s, 3)})
        if self._scalars is not None and record["kind"] != "warning":
            self._scalars.write(record)

    def _end(self, *, status: str, reason: str | None) -> None:
        seconds = round(time.monotonic() - self._began_s, 3)
        self._run |= {"status": status, "reason": reason, "ended": now(), "seconds": seconds}
        write_run(self._folder, self._run)

    def _report_after_failure(self) -> None:
        try:
            write_report(self._folder)
        except Exception as error:
            # The failure that ended the run is the one to be told.
            self._console.say(f"warning: no report could be written: {error}", style="yellow")


def _ratio(plain_bytes: float, sent_bytes: float) -> float:
    return plain_bytes / sent_bytes if sent_bytes else math.nan
