"""What the loop does for the compressed exchange: tells it the step, runs its probes, logs its measures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.policy.config import Direction
from tightrec.models.dlrm import DLRM
from tightrec.sharding.config import FRAMED
from tightrec.sharding.measures import DIRECTIONS
from tightrec.sharding.plan import PlanRow
from tightrec.sharding.steering import Steering
from tightrec.trainer.data.batch import Batch
from tightrec.trainer.ranks import Ranks
from tightrec.trainer.report.run_log import RunLog


class ExchangeWatch:
    """Of one job.

    Args:
        steering: of the exchange; None: torchrec's own exchange is in use and there is nothing to do.
        task: holds the model whose loss probes compare.
        plain_plan: bytes of plain float32 by table.
        ranks: all of them.
        log: of the run.
    """

    def __init__(
        self,
        steering: Steering | None,
        task: nn.Module,
        plain_plan: Sequence[PlanRow],
        ranks: Ranks,
        log: RunLog,
    ) -> None:
        self._steering, self._ranks, self._log = steering, ranks, log
        self._plain = {
            "forward": {row.table: row.forward_bytes for row in plain_plan},
            "backward": {row.table: row.backward_bytes for row in plain_plan},
        }
        self._dims = {row.table: row.dim for row in plain_plan}
        self._model = next(module for module in task.modules() if isinstance(module, DLRM))
        self._framed = steering is not None and steering.codec.framed

    def begin(self, step: int) -> None:
        """A training step begins, after ``step`` others."""
        if self._steering is not None:
            self._steering.set_step(step)

    def end(self, step: int, batch: Batch) -> None:
        """A training step has ended, with ``step`` done: probe where it is due; a collective then."""
        if self._steering is None or not self._steering.probe.ready:
            return
        with torch.no_grad():
            # Of no table, so that they are the same in every loss that the probe compares.
            hashed = self._model.hashed(batch.sparse)
        record = self._steering.probe.run(lambda pooled: self._loss(pooled, hashed, batch))
        self._log.probe(
            step=step,
            total_dne=record["total_dne"],
            budget=record["budget"],
            multiplier=record["multiplier"],
            tables=record["tables"],
        )

    def _loss(self, pooled: KeyedTensor, hashed: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of log losses, rows and positives of this rank's batch."""
        logits = self._model.from_pooled(batch.dense, pooled, hashed)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits.double(), batch.labels.double(), weight=batch.weights.double(), reduction="sum"
        )
        weights = batch.weights.double()
        return losses, weights.sum(), (weights * batch.labels).sum()

    def log(self, step: int, sent_per_step: Mapping[str, float]) -> None:
        """Record what the exchange measured since the last call; a collective.

        Args:
            step: steps done.
            sent_per_step: bytes of all ranks by purpose.
        """
        steering = self._steering
        if steering is None or not self._framed:
            return
        measures = steering.pilot.measures.take()
        everybody = self._ranks.gather({way: asdict(found) for way, found in measures.items()})
        for line in steering.messages():
            self._log.say(f"codec: {line}")
        for report in steering.modes.take_reports():
            tables = report["tables"]
            if report["plain"]:
                # What the table's frames would be like, and why it is not sent in any.
                why = f"plain: {report['reason']}"
                tables = {name: table | {"reason": why} for name, table in tables.items()}
            self._log.choice(
                step=step,
                direction=report["direction"],
                link_gb_s=report["link_gb_s"],
                plain=report["plain"],
                tables=tables,
                reason=report["reason"],
            )
        for way in DIRECTIONS:
            mine = everybody[self._ranks.rank][way]
            # Steps that ``auto`` sends plain are told too, else the figures would be of the others alone.
            if getattr(steering.codec, way) not in FRAMED or not sum(self._plain[way].values()):
                continue
            times = {
                name: mine[f"{name}_s"] / max(mine["timed"], 1) * 1e3
                for name in ("encode", "exchange", "decode")
            }
            self._log.codec(
                step=step,
                direction=way,
                encode_ms=times["encode"],
                exchange_ms=times["exchange"],
                decode_ms=times["decode"],
                plain_bytes=float(sum(self._plain[way].values())),
                sent_bytes=sent_per_step[way],
                multiplier=steering.policy.multiplier,
                tables=self._tables(way, [rank[way] for rank in everybody]),
            )

    def _tables(self, way: Direction, everybody: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Figures of a step by table, all ranks together; none where no step was looked into."""
        assert self._steering is not None
        sampled = max(rank["sampled"] for rank in everybody)
        names = {name for rank in everybody for name in rank["tables"]}
        tables = {}
        for name in sorted(names):
            entries = [rank["tables"][name] for rank in everybody if name in rank["tables"]]
            worst = [entry["worst"] for entry in entries if entry["worst"] is not None]
            modes: Counter[str] = Counter()
            for entry in entries:
                modes.update(entry["modes"])
            plain = self._plain[way][name]
            if max(worst, default=0.0) > 1:
                self._log.warn(
                    f"table {name}: an error of its {way} exchange was {max(worst):.3g} times its bound. "
                    "This is a defect of the codec: please report it with the run folder."
                )
            if sampled and modes:
                tables[name] = {
                    "rows": plain / (4 * self._dims[name]),
                    "distinct": sum(entry["values"] for entry in entries) / sampled / self._dims[name],
                    "plain_bytes": plain,
                    "sent_bytes": sum(entry["sent_bytes"] for entry in entries) / sampled,
                    "bound": self._steering.policy.word(way, name),
                    "error_over_bound": max(worst, default=None),
                    "mode": modes.most_common(1)[0][0],
                }
        return tables

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the exchange; the same on every rank."""
        return None if self._steering is None or not self._framed else self._steering.state_dict()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's ``state``, of a job on any number of ranks."""
        if state is not None and self._steering is not None and self._framed:
            self._steering.load_state_dict(state)
