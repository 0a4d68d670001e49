"""When a path that fails is left alone, and when it is tried again.

A path that fails at once is free at once and looks idle: without this it would attract everything. A circuit
breaker (Nygard, Release It!, 2007) with exponential backoff.
"""

import math

FAILURES = 3
"""Failures in a row that make a path rest: a worker that dies alone costs the others of its path nothing."""

FIRST_REST_S, LONGEST_REST_S = 0.1, 10.0
"""Doubled from the first to the longest with every failure after a rest."""


class Rest:
    """Of one path."""

    __slots__ = ("_failures", "_pause_s", "until")

    def __init__(self) -> None:
        self.until = -math.inf
        """The path rests before then, in seconds."""
        self._failures, self._pause_s = 0, FIRST_REST_S

    def failed(self, started: float, now: float) -> None:
        """A batch that began at ``started`` has failed."""
        if started < self.until:
            # It began before the path rested, or had to take it nevertheless: known already.
            return
        self._failures += 1
        if self._failures >= FAILURES:
            self.until = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_REST_S)

    def succeeded(self) -> None:
        """A batch has its scores: what was is forgotten."""
        self.until, self._failures, self._pause_s = -math.inf, 0, FIRST_REST_S
