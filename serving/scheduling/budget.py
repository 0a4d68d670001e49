"""The budget of compute that lets idle slots, and only those, be spent on accuracy: a token bucket."""

import math


class Budget:
    """Slot-seconds that a device has left over.

    It earns ``slots * headroom`` a second and pays for every batch. It keeps at most what ``span_s`` seconds
    earn, so that a quiet night does not pay for a rush, and owes at most as much, so that a rush is soon
    forgotten. A token bucket (Turner 1986) over compute.
    """

    __slots__ = ("_earned_at", "level_s", "rate", "span_s")

    def __init__(self, slots: int, headroom: float) -> None:
        self.rate = slots * headroom
        """Slot-seconds earned a second."""
        self.span_s = 0.0
        """Seconds of earning that it holds at most."""
        self.level_s = 0.0
        """Slot-seconds that are left; below 0: owed."""
        self._earned_at: float | None = None

    def earn(self, now: float, span_s: float) -> None:
        """Bring the level up to ``now``; ``span_s`` seconds of earning are kept at most."""
        if self._earned_at is None:
            self.level_s = self.rate * span_s
        else:
            self.level_s += self.rate * max(0.0, now - self._earned_at)
        self._earned_at = now if self._earned_at is None else max(now, self._earned_at)
        self.span_s = span_s
        self._bound()

    def affords(self, cost_s: float) -> bool:
        """Whether ``cost_s`` slot-seconds leave it at 0 or above."""
        return self.level_s >= cost_s

    def pay(self, cost_s: float) -> None:
        """Take ``cost_s`` slot-seconds; negative: give back."""
        self.level_s -= cost_s
        self._bound()

    def _bound(self) -> None:
        cap = self.rate * self.span_s
        self.level_s = min(cap, max(-cap, self.level_s))


class Reach:
    """How long a batch on a dearer path may last, as a share of the target: learnt from what it costs others.

    A long batch gains a little accuracy on its own rows, and while it runs a newcomer may be refused that
    would have been served. Both are counted in the same unit, rows predicted right: the logarithm of the
    reach rises by the gain and falls by the loss, so that it settles where they balance. Without news it
    drifts back to the whole target, so that a rush is not remembered for ever.
    """

    __slots__ = ("_mean_rows", "_seen_at", "share")

    START, LEAST, MOST = 1.0, 0.01, 1.0
    RATE = 0.25
    """Change of the logarithm for the gain or loss of one usual query."""
    WEIGHT = 0.02
    """Of the newest query in the mean of their rows."""
    FORGET_S = 30.0
    """Seconds that halve the logarithm."""

    def __init__(self) -> None:
        self.share = self.START
        """Of the target."""
        self._mean_rows = 0.0
        self._seen_at: float | None = None

    def see(self, rows: int, now: float) -> None:
        """A query of ``rows`` arrived."""
        if self._seen_at is not None:
            self.share **= 0.5 ** (max(0.0, now - self._seen_at) / self.FORGET_S)
        self._seen_at = now
        mean = self._mean_rows
        self._mean_rows = mean + self.WEIGHT * (rows - mean) if mean else float(rows)

    def learn(self, rows: float) -> None:
        """``rows`` more were predicted right because of dearer paths; negative: fewer."""
        change = self.RATE * rows / max(1.0, self._mean_rows)
        self.share = min(self.MOST, max(self.LEAST, self.share * math.exp(max(-1.0, min(1.0, change)))))
