"""Keeps the probed NE difference of all tables together within a budget, by one multiplier on the bounds."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from tightrec.compression.policy.config import BoundConfig
from tightrec.compression.policy.sensitivity import Measurement, fit


class Feedback:
    """A controller of the multiplier m.

    Each probe comes with a strength: the size of all bounds together, to whose square the total is expected
    to be proportional. The factor between them is smoothed over the last probes by the same robust fit as a
    table's sensitivity, with a standard error. Where it puts the total above the budget, m falls to what
    would meet it. Where it puts it below, m rises to what would meet it were the factor one standard error
    larger: in doubt bounds stay tight. A probe raises m by at most ``rate`` and lowers it by at most its
    square.

    Args:
        config: rate, limits and memory.
        budget: NE difference allowed; above 0.
    """

    def __init__(self, config: BoundConfig, budget: float) -> None:
        self.multiplier = 1.0
        self._config = config
        self._budget = budget
        self._last: deque[Measurement] = deque(maxlen=config.probe_memory)

    def observe(
        self, total_dne: float, strength: float, *, can_loosen: bool = True, can_tighten: bool = True
    ) -> str:
        """Take in the NE difference probed at the bounds of now, move the multiplier, say why.

        Args:
            total_dne: averaged over ranks; anything but a finite number is passed over.
            strength: of these bounds, above 0, proportional to the multiplier.
            can_loosen: whether bounds would follow a larger multiplier and are not rising anyway. Else the
                multiplier must not run ahead of them, or it takes many probes to come back.
            can_tighten: whether some bound would follow a smaller one.
        """
        budget = f"codec.budget_ne={self._budget:g}"
        if not math.isfinite(total_dne):
            stays = f"multiplier stays {self.multiplier:.3g}"
            return f"the probed NE difference is {total_dne}: passed over, {stays}"
        self._last.append((strength, float(total_dne)))
        if len(self._last) < self._config.probe_needed:
            return (
                f"probed NE difference {total_dne:.2e}, {len(self._last)} of {self._config.probe_needed} "
                "probes before the multiplier moves"
            )
        found = fit(self._last)
        before = self.multiplier
        now, unsure, most = (each * strength**2 for each in (found.slope, found.error, found.cautious))
        seen = f"NE difference {now:.2e} +- {unsure:.1e} over {found.count} probes"
        if now > self._budget:
            if not can_tighten:
                return f"{seen} is above {budget}, but every bound is at its tightest"
            self._move(before * math.sqrt(self._budget / now))
            verdict = "above"
        elif most < self._budget:
            if not can_loosen:
                return f"{seen} is below {budget}, but bounds are at their loosest or on the way there"
            self._move(before * math.sqrt(self._budget / most) if most else math.inf)
            verdict = "below"
        else:
            return f"{seen} meets {budget} as closely as probes can tell: multiplier stays {before:.3g}"
        if self.multiplier == before:
            return f"{seen} is {verdict} {budget}, but the multiplier is at its limit {before:.3g}"
        return f"{seen} is {verdict} {budget}: multiplier {before:.3g} -> {self.multiplier:.3g}"

    def _move(self, wanted: float) -> None:
        config = self._config
        moved = limited(self.multiplier, wanted, config.rate)
        self.multiplier = min(max(moved, config.least_multiplier), config.most_multiplier)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; they do not depend on the budget, so that it can be changed on resuming."""
        return {"multiplier": self.multiplier, "totals": [list(pair) for pair in self._last]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, within this configuration's limits."""
        config = self._config
        self._last.clear()
        self._last.extend((float(strength), float(dne)) for strength, dne in state["totals"])
        self.multiplier = min(
            max(float(state["multiplier"]), config.least_multiplier), config.most_multiplier
        )


def limited(before: float, wanted: float, rate: float) -> float:
    """``wanted``, but at most ``rate`` times ``before`` and at least ``before`` over ``rate`` squared."""
    return min(max(wanted, before / rate**2), before * rate)
