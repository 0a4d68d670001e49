"""How long a batch will take on a path: its measured profile, corrected by what was observed since."""

import bisect
from collections.abc import Callable

from tightrec.serving.paths import Profile, ServingPath, between
from tightrec.serving.scheduling.rest import Rest

OBSERVED_WEIGHT = 0.1
"""Of the newest batch in the running means."""

CLIP = 4.0
"""One batch counts as at most this many times slower or faster than the running mean says."""

FORGET_S = 3.0
"""Seconds without an observation that halve a correction: a path that looked too slow is tried again."""

MARGIN = 0.5
"""Mean absolute deviations that are planned on top of the mean, so that most batches end in time. More would
refuse too many that could have been served, less lets too many be served late."""

MOST_START = 0.25
"""Mean absolute deviation that a path starts from, at most: a profile with rare spikes has a large 99th
percentile, and a path that is planned with that is never tried, so that nothing better is learnt."""

NORMAL_P99 = 2.3263478740408408
"""Standard deviations from the median to the 99th percentile of a normal distribution."""

MOST_ROWS = 10**12
"""What an endless time is worth: a finite number, however far a profile is extended."""

Durations = Callable[[ServingPath, int, int], float]
"""True seconds of a batch: (path, rows, number of the batch). Only a simulator knows them."""


class Curve:
    """A profile as a function that rises, and its inverse."""

    def __init__(self, profile: Profile) -> None:
        self._rows = profile.rows
        seconds: list[float] = []
        for ms in profile.latency_ms:
            # A measured latency that falls with the rows is noise; the inverse needs a rising one.
            seconds.append(max(ms / 1e3, seconds[-1] if seconds else 0.0))
        self._seconds = tuple(seconds)

    def seconds(self, rows: int) -> float:
        """Expected duration of a batch of ``rows``, as :meth:`Profile.expected_ms` interpolates it."""
        return between(self._rows, self._seconds, rows)

    def rows_within(self, seconds: float) -> int:
        """The most rows that take at most ``seconds``; 0: not even one row does."""
        known, values = self._rows, self._seconds
        place = bisect.bisect_right(values, seconds)
        if place == 0:
            return 0
        if place == len(known):
            return int(min(known[-1] * seconds / values[-1], MOST_ROWS))
        before, after = known[place - 1], known[place]
        low, high = values[place - 1], values[place]
        return before + int((seconds - low) / (high - low) * (after - before))


class Weather:
    """How much slower than profiled the paths of one device are now, all together: a running mean.

    What slows one path, such as other programs on the same cores, slows the others too: a path that was not
    observed for a while is taken to be as slow as the rest, not as fast as its profile.
    """

    def __init__(self) -> None:
        self._mean = 1.0
        self._observed_at: float | None = None

    def now(self, now: float) -> float:
        """Observed over profiled duration; without news it decays towards 1."""
        if self._observed_at is None:
            return self._mean
        return 1.0 + (self._mean - 1.0) * _kept(now - self._observed_at)

    def observe(self, ratio: float, now: float) -> None:
        """A batch took ``ratio`` times its profiled duration."""
        mean = self.now(now)
        self._mean = mean + OBSERVED_WEIGHT * (ratio - mean)
        self._observed_at = now


class PathEstimate:
    """Durations on one path: expected (the mean) and planned (with a margin for the tail).

    The ratio of observed to profiled duration and its mean absolute deviation are exponentially weighted
    running means, as TCP keeps them of its round trips (Jacobson 1988). A ratio that is no longer observed
    decays towards that of its device: a path whose queries all seem late would otherwise never be tried
    again.
    """

    def __init__(
        self,
        path: ServingPath,
        quality: float,
        truth: Durations | None = None,
        weather: Weather | None = None,
    ) -> None:
        self.path = path
        self.quality = quality
        self.threads = path.threads
        self.rest = Rest()
        self.resting = False
        """Whether only queries that must take this path may do so now."""
        self.curve = Curve(path.profile)
        self.mean = 1.0
        self.deviation = _spread(path.profile)
        self._truth = truth
        self._weather = weather or Weather()
        self._number = 0
        self._observed_at: float | None = None
        self._start = self.deviation
        self.expected_factor = 1.0
        self.planned_factor = 1.0
        self.refresh(0.0)

    def refresh(self, now: float, number: int = 0) -> None:
        """Bring the factors up to ``now``; ``number`` is that of the batch which starts next."""
        self._number = number
        if self._truth is not None:
            return
        mean, deviation = self._decayed(now)
        self.expected_factor = mean
        self.planned_factor = mean + MARGIN * deviation

    def expected_s(self, rows: int) -> float:
        """Mean duration of a batch of ``rows``."""
        if self._truth is not None:
            return self._truth(self.path, rows, self._number)
        return self.curve.seconds(rows) * self.expected_factor

    def planned_s(self, rows: int) -> float:
        """Duration that most batches of ``rows`` do not exceed: what deadlines are checked with."""
        if self._truth is not None:
            return self._truth(self.path, rows, self._number)
        return self.curve.seconds(rows) * self.planned_factor

    def rows_within(self, seconds: float) -> int:
        """The most rows whose planned duration is at most ``seconds``."""
        if self._truth is not None:
            ratio = self._truth(self.path, 1, self._number) / self.curve.seconds(1)
            return self.curve.rows_within(seconds / ratio)
        return self.curve.rows_within(seconds / self.planned_factor)

    def observe(self, rows: int, took_s: float, now: float) -> None:
        """A batch of ``rows`` took ``took_s`` seconds."""
        mean, deviation = self._decayed(now)
        ratio = min(max(took_s / self.curve.seconds(rows), mean / CLIP), mean * CLIP)
        self.deviation = deviation + OBSERVED_WEIGHT * (abs(ratio - mean) - deviation)
        self.mean = mean + OBSERVED_WEIGHT * (ratio - mean)
        self._observed_at = now
        self._weather.observe(ratio, now)
        self.refresh(now, self._number)

    def _decayed(self, now: float) -> tuple[float, float]:
        keep = 0.0 if self._observed_at is None else _kept(now - self._observed_at)
        usual = self._weather.now(now)
        return usual + (self.mean - usual) * keep, self._start + (self.deviation - self._start) * keep


def _kept(seconds: float) -> float:
    """Share of an observation that counts after ``seconds``."""
    return 0.5 ** (max(0.0, seconds) / FORGET_S)


def _spread(profile: Profile) -> float:
    """Mean absolute deviation of the duration over its median, from the 99th percentiles.

    The median over the sizes; 0.8 deviations are one mean absolute deviation of a normal distribution.
    """
    pairs = zip(profile.tail_ms, profile.latency_ms, strict=True)
    ratios = sorted(max(0.0, tail / median - 1.0) for tail, median in pairs)
    return min(0.8 * ratios[len(ratios) // 2] / NORMAL_P99, MOST_START)
