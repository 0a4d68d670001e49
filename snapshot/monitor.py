"""Watching the scores of a snapshot in service: drift, NE and calibration over a sliding window.

Shapes: n rows of one update, K bins of the histogram of scores.

- Drift is the population stability index (PSI) of the window's scores against those of the held-out rows on
  which the snapshot was made: sum over bins of (p - q) ln(p / q), p and q the shares of a bin. By the usual
  rule of credit scoring 0.1 is worth a look and 0.2 is a shift (Siddiqi, "Credit Risk Scorecards", 2006).
- NE is log loss divided by the entropy of the window's own base rate (He et al. 2014, section 3); it is
  compared with the NE of the held-out rows.
- Calibration is predicted clicks divided by actual ones, compared with that of the held-out rows.

An alarm needs two things: the value is past its threshold, and it differs from the reference by so many
standard errors that chance does not explain it, which keeps a small window quiet. All sums are kept by blocks
of rows, so memory does not grow and the outcome does not depend on how rows are cut into updates.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tightrec.snapshot.score_sums import (
    SUMS,
    Floats,
    calibration_of,
    counts_of,
    labels_of,
    moment_sums,
    ne_of,
    probabilities_of,
    score_histogram,
)

__all__ = ["Alarm", "Monitor", "MonitorConfig", "score_histogram"]

BLOCKS = 10
"""The window moves on by one block, a tenth of it."""

RECOVERED = 0.8
"""An alarm ends once its value is within this share of the way to the threshold: one that swings around the
threshold does not ring at every swing."""

_SMOOTHING = 0.5
"""Added to each bin's count, so that an empty bin has a logarithm."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is watched, and what rings."""

    window: int = 20_000
    """Rows that are looked at together; in ten blocks, the oldest of which leaves when a new one is full."""

    least_rows: int = 2_000
    """Nothing is judged on fewer rows than this."""

    psi: float = 0.2
    """Alarm where the PSI of the scores is at least this."""

    ne_increase: float = 0.05
    """Alarm where NE is at least this much above the held-out rows' NE, relative to it."""

    calibration_band: float = 0.1
    """Alarm where calibration is at least this far from the held-out rows' calibration, relative to it."""

    sureness: float = 5.0
    """Standard errors that a value must be away from its reference; 5 is one false alarm in about two million
    independent windows."""

    def __post_init__(self) -> None:
        if self.window < BLOCKS or self.window % BLOCKS:
            raise ValueError(f"window={self.window} must be a multiple of {BLOCKS}.")
        if not 1 <= self.least_rows <= self.window:
            raise ValueError(f"least_rows={self.least_rows} must lie between 1 and window={self.window}.")
        for name in ("psi", "ne_increase", "calibration_band", "sureness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A value that crossed its threshold."""

    what: str
    """``psi``, ``ne`` or ``calibration``."""

    value: float
    """What it was: the PSI, the NE, predicted divided by actual clicks."""

    reference: float
    """What it was on the held-out rows; 0 for the PSI."""

    threshold: float
    """What it crossed, in the unit of ``value``."""

    rows: int
    """Rows of the window."""

    at_row: int
    """Rows seen until then: scored ones for ``psi``, labelled ones else."""

    @property
    def sentence(self) -> str:
        """What is logged."""
        return (
            f"{self.what} is {self.value:.4g} over the last {self.rows:,} rows, past {self.threshold:.4g} "
            f"(held-out rows: {self.reference:.4g}), at row {self.at_row:,}"
        )


@dataclass(frozen=True, kw_only=True)
class _Recovery:
    """A value that came back."""

    sentence: str
    """What is logged."""


class Monitor:
    """Keeps the sums of a sliding window and says when they leave the reference; safe to share by threads.

    Args:
        reference: what :func:`score_histogram` returned, as the manifest keeps it.
        config: window and thresholds.

    Raises:
        ValueError: ``reference`` is malformed.
    """

    def __init__(self, reference: Mapping[str, Any], config: MonitorConfig | None = None) -> None:
        self.config = config or MonitorConfig()
        try:
            self._edges = np.asarray(reference["edges"], np.float64)
            self._reference_counts = np.asarray(reference["counts"], np.float64)
            self._figures = {
                what: (float(reference[what]["value"]), float(reference[what]["error"]))
                for what in ("ne", "calibration")
                if reference.get(what)
            }
            if len(self._reference_counts) != len(self._edges) + 1 or not self._reference_counts.sum() > 0:
                raise ValueError("counts must be one more than edges")
            if not all(value > 0 for value, _ in self._figures.values()):
                raise ValueError("ne and calibration must be above 0")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the reference of the monitor is not what score_histogram returns ({error!r})."
            ) from None
        self._lock = Lock()
        self._scored = _Window(len(self._reference_counts), self.config.window)
        self._labelled = _Window(SUMS, self.config.window)
        self._active: dict[str, Alarm] = {}
        self._alarms: deque[Alarm] = deque(maxlen=1000)

    @property
    def active(self) -> dict[str, Alarm]:
        """Alarms that rang and have not recovered, by what they are about."""
        with self._lock:
            return dict(self._active)

    @property
    def alarms(self) -> list[Alarm]:
        """The last 1,000 alarms, oldest first."""
        with self._lock:
            return list(self._alarms)

    def update(self, probabilities: ArrayLike, labels: ArrayLike | None = None) -> list[Alarm]:
        """Take in the scores [n] of served rows, with their labels [n] where these are known already.

        Returns:
            The alarms that these rows raised; each is logged as a warning too.

        Raises:
            ValueError: a value that is no probability or label; nothing of the update is taken in then.
        """
        scores = probabilities_of(probabilities)
        known = None if labels is None else labels_of(labels, len(scores))
        with self._lock:
            news = self._take_scores(scores)
            if known is not None:
                news += self._take_labels(scores, known)
        return _told(news)

    def update_labels(self, probabilities: ArrayLike, labels: ArrayLike) -> list[Alarm]:
        """Take in labels [n] that came later, with the probabilities [n] that were served for these rows.

        For rows whose scores :meth:`update` had before; their order need not be that of serving. Returns and
        raises as :meth:`update`.
        """
        scores = probabilities_of(probabilities)
        known = labels_of(labels, len(scores))
        with self._lock:
            news = self._take_labels(scores, known)
        return _told(news)

    def values(self) -> dict[str, float | int | None]:
        """``psi``, ``ne`` and ``calibration`` of the windows as they are, None where rows do not tell;
        ``rows`` scored and ``labelled_rows`` in them."""
        with self._lock:
            ne, calibration = ne_of(self._labelled.sums), calibration_of(self._labelled.sums)
            return {
                "psi": self._psi() if self._scored.rows else None,
                "ne": ne[0] if ne else None,
                "calibration": calibration[0] if calibration else None,
                "rows": self._scored.rows,
                "labelled_rows": self._labelled.rows,
            }

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, in JSON's types."""
        with self._lock:
            return {
                "of": self._fingerprint(),
                "scored": self._scored.state(),
                "labelled": self._labelled.state(),
                "active": [asdict(alarm) for alarm in self._active.values()],
                "alarms": [asdict(alarm) for alarm in self._alarms],
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state` of a monitor with the same reference and configuration.

        Raises:
            ValueError: the state is of another reference or configuration, or malformed.
        """
        if not isinstance(state, Mapping) or state.get("of") != self._fingerprint():
            raise ValueError(
                "the monitor's state belongs to another snapshot or configuration: start with an empty one."
            )
        scored = _Window(len(self._reference_counts), self.config.window)
        labelled = _Window(SUMS, self.config.window)
        try:
            scored.restore(state["scored"])
            labelled.restore(state["labelled"])
            active = {alarm["what"]: Alarm(**alarm) for alarm in state["active"]}
            alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the monitor's state is malformed ({error!r}): start with an empty one."
            ) from None
        with self._lock:
            self._scored, self._labelled, self._active = scored, labelled, active
            self._alarms.clear()
            self._alarms.extend(alarms)

    def _fingerprint(self) -> str:
        values = [asdict(self.config), self._edges.tolist(), self._reference_counts.tolist(), self._figures]
        return json.dumps(values)

    def _take_scores(self, scores: Floats) -> list[Alarm | _Recovery]:
        news: list[Alarm | _Recovery] = []
        for part in self._scored.cut(scores):
            if self._scored.add(counts_of(part[0], self._edges), len(part[0])):
                news += self._judge_drift()
        return news

    def _take_labels(self, scores: Floats, labels: Floats) -> list[Alarm | _Recovery]:
        news: list[Alarm | _Recovery] = []
        for some, known in self._labelled.cut(scores, labels):
            if self._labelled.add(moment_sums(some, known), len(some)):
                news += self._judge_labelled()
        return news

    def _psi(self) -> float:
        found, reference = self._scored.sums + _SMOOTHING, self._reference_counts + _SMOOTHING
        p, q = found / found.sum(), reference / reference.sum()
        return float(((p - q) * np.log(p / q)).sum())

    def _judge_drift(self) -> list[Alarm | _Recovery]:
        rows, others = self._scored.rows, float(self._reference_counts.sum())
        psi = self._psi()
        # Without drift, psi * n m / (n + m) of n and m rows is a chi-square of K - 1 degrees; the bound on
        # its tail is Laurent and Massart's ("Adaptive estimation of a quadratic functional", 2000, lemma 1).
        degrees, tail = len(self._reference_counts) - 1, self.config.sureness**2 / 2
        chance = (degrees + 2 * math.sqrt(degrees * tail) + 2 * tail) * (rows + others) / (rows * others)
        return self._judge("psi", psi, 0.0, psi, self.config.psi, psi >= chance, self._scored)

    def _judge_labelled(self) -> list[Alarm | _Recovery]:
        news: list[Alarm | _Recovery] = []
        ne, calibration = ne_of(self._labelled.sums), calibration_of(self._labelled.sums)
        for what, found, limit in (
            ("ne", ne, self.config.ne_increase),
            ("calibration", calibration, self.config.calibration_band),
        ):
            if found is None or what not in self._figures:
                continue
            value, reference = found[0], self._figures[what][0]
            away = value / reference - 1
            away = away if what == "ne" else abs(away)
            error = math.hypot(found[1], self._figures[what][1]) / reference
            sure = away >= self.config.sureness * error
            news += self._judge(what, value, reference, away, limit, sure, self._labelled)
        return news

    def _judge(
        self,
        what: str,
        value: float,
        reference: float,
        away: float,
        limit: float,
        sure: bool,
        window: "_Window",
    ) -> list[Alarm | _Recovery]:
        """``away`` is how far ``value`` is from ``reference``, ``limit`` how far it may be."""
        if what in self._active:
            if away <= RECOVERED * limit:
                del self._active[what]
                sentence = f"{what} recovered: {value:.4g} over the last {window.rows:,} rows"
                return [_Recovery(sentence=sentence)]
            return []
        if window.rows < self.config.least_rows or away < limit or not sure:
            return []
        threshold = limit if what == "psi" else reference * (1 + math.copysign(limit, value - reference))
        alarm = Alarm(
            what=what,
            value=value,
            reference=reference,
            threshold=threshold,
            rows=window.rows,
            at_row=window.seen,
        )
        self._active[what] = alarm
        self._alarms.append(alarm)
        return [alarm]


def _told(news: Sequence[Alarm | _Recovery]) -> list[Alarm]:
    """Log all, return the alarms. Not under a lock: a handler of the logs may ask the monitor."""
    for one in news:
        _log.log(logging.WARNING if isinstance(one, Alarm) else logging.INFO, "%s", one.sentence)
    return [one for one in news if isinstance(one, Alarm)]


class _Window:
    """Sums [width] over the last ``BLOCKS`` blocks of rows, the last of them filling up."""

    def __init__(self, width: int, rows: int) -> None:
        self.block_rows = rows // BLOCKS
        self.seen = 0
        self._filling = np.zeros(width)
        self._filling_rows = 0
        self._blocks: deque[Floats] = deque(maxlen=BLOCKS)

    @property
    def rows(self) -> int:
        """Rows in the window."""
        return len(self._blocks) * self.block_rows

    @property
    def sums(self) -> Floats:
        """[width] over the full blocks."""
        # Added up anew: a running difference would gather rounding errors for as long as the service runs.
        return np.sum(self._blocks, axis=0) if self._blocks else np.zeros_like(self._filling)

    def cut(self, *columns: Floats) -> Sequence[tuple[Floats, ...]]:
        """The rows of ``columns`` in parts that end where blocks end."""
        if self._filling_rows + len(columns[0]) <= self.block_rows:
            return [columns]
        places = range(self.block_rows - self._filling_rows, len(columns[0]), self.block_rows)
        return list(zip(*(np.split(column, places) for column in columns), strict=True))

    def add(self, sums: Floats, rows: int) -> bool:
        """Add a part of :meth:`cut`; True where it completes a block."""
        self._filling = self._filling + sums
        self._filling_rows += rows
        self.seen += rows
        if self._filling_rows < self.block_rows:
            return False
        self._blocks.append(self._filling)
        self._filling, self._filling_rows = np.zeros_like(self._filling), 0
        return True

    def state(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "filling_rows": self._filling_rows,
            "filling": self._filling.tolist(),
            "blocks": [block.tolist() for block in self._blocks],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        vectors = [np.asarray(vector, np.float64) for vector in (state["filling"], *state["blocks"])]
        if any(vector.shape != self._filling.shape for vector in vectors):
            raise ValueError("sums of another length")
        self.seen, self._filling_rows = int(state["seen"]), int(state["filling_rows"])
        self._filling, blocks = vectors[0], vectors[1:]
        self._blocks = deque(blocks, maxlen=BLOCKS)
