"""How long a batch will take on a path: its measured profile, corrected by what was observed since."""

import bisect
import math
from collections.abc import Callable

from tightrec.serving.paths import Profile, ServingPath, between
from tightrec.serving.scheduling.rest import Rest

OBSERVED_WEIGHT = 0.1
"""Of the newest batch in the running means."""

CLIP = 4.0
"""One batch counts as at most this many times slower or faster than the running mean says."""

FORGET_S = 3.0
"""Seconds without an observation that halve a device's correction: what looked too slow is tried again."""

STALE_S = 0.01
"""Corrections decay in seconds: between two batches they need not be refreshed more often than this."""

BIAS_WEIGHT = 0.02
"""Of the newest batch in the bias of a path."""

BIAS_FORGET_S = 60.0
"""The same as FORGET_S for the bias of a path: profiles are wrong for longer than weather lasts."""

MARGIN = 0.5
"""Mean absolute deviations that are planned on top of the mean, so that most batches end in time. More would
refuse too many that could have been served, less lets too many be served late."""

MOST_START = 0.25
"""Mean absolute deviation that a path starts from, at most: a profile with rare spikes has a large 99th
percentile, and a path that is planned with that is never tried, so that nothing better is learnt."""

_LEAST_CHANCE = 1e-6
"""Of being late that is told apart from none."""

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
    """How much slower than profiled the paths of one device are now, all together: running means.

    What slows one path, such as other programs on the same cores, slows the others too, and a stall that hits
    the batch of one path says nothing against that path.
    """

    def __init__(self) -> None:
        self._mean, self._deviation = 1.0, 0.0
        self._observed_at = -math.inf
        self.slow = 1.0
        """What is left of the ratios when the weather is taken out, slow mean over all paths."""

    def now(self, now: float, usual: float) -> tuple[float, float]:
        """Observed over profiled duration and its mean absolute deviation; without news they decay.

        Args:
            usual: deviation without news.
        """
        keep = _kept(now - self._observed_at, FORGET_S)
        return 1.0 + (self._mean - 1.0) * keep, usual + (self._deviation - usual) * keep

    def observe(self, ratio: float, now: float, usual: float) -> None:
        """A batch took ``ratio`` times what its path takes without weather."""
        mean, deviation = self.now(now, usual)
        self._mean = mean + OBSERVED_WEIGHT * (ratio - mean)
        self._deviation = deviation + OBSERVED_WEIGHT * (abs(ratio - mean) - deviation)
        self._observed_at = now


class PathEstimate:
    """Durations on one path: expected (the mean) and planned (with a margin for the tail).

    Observed over profiled duration is a product: the weather of the device, which changes quickly, times the
    bias of the path's profile, which is learnt slowly. With a quick mean for each path, the one that met the
    last stall would look worst, and the one of which least is known would look best. Mean and
    mean absolute deviation are exponentially weighted, as TCP keeps them of its round trips (Jacobson 1988).
    Without news all of it decays towards the profile: a path whose queries all seem late would otherwise
    never be tried again.
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
        self._truth = truth
        self._weather = weather or Weather()
        self._slow: float | None = None
        self._number = 0
        self._observed_at = -math.inf
        self._usual = _spread(path.profile)
        self._deviation = self._usual
        self.expected_factor = 1.0
        self.planned_factor = 1.0
        self.refresh(0.0)

    def refresh(self, now: float, number: int = 0) -> None:
        """Bring the factors up to ``now``; ``number`` is that of the batch which starts next."""
        self._number = number
        if self._truth is not None:
            return
        mean, deviation = self._weather.now(now, self._usual)
        bias = self._bias_now(now)
        self.expected_factor, self._deviation = bias * mean, bias * deviation
        self.planned_factor = self.expected_factor + MARGIN * self._deviation

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

    def surely_s(self, rows: int, chance: float) -> float:
        """Duration that a batch of ``rows`` exceeds with at most this ``chance``, but no less than planned.

        By the tails of a Laplace distribution, whose mean absolute deviation is its scale.
        """
        if self._truth is not None:
            return self._truth(self.path, rows, self._number)
        deviations = max(MARGIN, math.log(0.5 / min(0.5, max(chance, _LEAST_CHANCE))))
        return self.curve.seconds(rows) * (self.expected_factor + deviations * self._deviation)

    def rows_within(self, seconds: float) -> int:
        """The most rows whose planned duration is at most ``seconds``."""
        if self._truth is not None:
            ratio = self._truth(self.path, 1, self._number) / self.curve.seconds(1)
            return self.curve.rows_within(seconds / ratio)
        return self.curve.rows_within(seconds / self.planned_factor)

    def observe(self, rows: int, took_s: float, now: float) -> None:
        """A batch of ``rows`` took ``took_s`` seconds."""
        bias = self._bias_now(now)
        mean = self._weather.now(now, self._usual)[0]
        ratio = min(max(took_s / self.curve.seconds(rows), bias * mean / CLIP), bias * mean * CLIP)
        self._weather.observe(ratio / bias, now, self._usual)
        # The same of this path over that of all: of a device with one path it is 1, whatever the weather.
        whole = self._weather.slow
        slow = bias * whole
        self._slow = slow + BIAS_WEIGHT * (ratio / mean - slow)
        self._weather.slow = whole + BIAS_WEIGHT * (ratio / mean - whole)
        self._observed_at = now
        self.refresh(now, self._number)

    def _bias_now(self, now: float) -> float:
        """What this path's profile errs by, beside those of the other paths of the device."""
        if self._slow is None:
            return 1.0
        bias = self._slow / self._weather.slow
        return 1.0 + (bias - 1.0) * _kept(now - self._observed_at, BIAS_FORGET_S)


def _kept(seconds: float, half_s: float) -> float:
    """Share of an observation that counts after ``seconds``."""
    return 0.5 ** (max(0.0, seconds) / half_s)


def _spread(profile: Profile) -> float:
    """Mean absolute deviation of the duration over its median, from the 99th percentiles.

    The median over the sizes; 0.8 deviations are one mean absolute deviation of a normal distribution.
    """
    pairs = zip(profile.tail_ms, profile.latency_ms, strict=True)
    ratios = sorted(max(0.0, tail / median - 1.0) for tail, median in pairs)
    return min(0.8 * ratios[len(ratios) // 2] / NORMAL_P99, MOST_START)
