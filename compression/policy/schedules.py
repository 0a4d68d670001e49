"""The multiplier of all bounds by step: the iteration level of SC'24 (arXiv 2407.04272).

Early in training, larger errors are forgiven: the multiplier falls from ``factor`` to 1 over ``steps``. It
multiplies relative and absolute bounds alike.
"""

import math

from tightrec.compression.policy.config import ScheduleName

SC24_FACTOR = 2.0
SC24_STEPS = 65_536


def schedule_multiplier(
    schedule: ScheduleName, step: int, factor: float = SC24_FACTOR, steps: int = SC24_STEPS
) -> float:
    """The multiplier at ``step``, counted from 0.

    Args:
        schedule: ``step`` falls in ten equal stairs, ``linear`` on a line, ``log`` with the logarithm of the
            step (fast first); ``sc24`` is ``step`` with the published constants. ``constant`` and
            ``feedback`` leave bounds as they are: their multiplier is 1.
        step: of training.
        factor: the multiplier at step 0; not read by ``sc24``.
        steps: from which on it is 1; not read by ``sc24``.
    """
    if schedule == "sc24":
        schedule, factor, steps = "step", SC24_FACTOR, SC24_STEPS
    if schedule in ("constant", "feedback") or step >= steps:
        return 1.0
    step = max(step, 0)
    share = step / steps
    fall = 1 - 1 / factor
    if schedule == "step":
        return factor * (1 - (10 * step // steps) * fall / 10)
    if schedule == "linear":
        return factor * (1 - share * fall)
    return factor * ((1 - math.log(1 + share * (math.e - 1))) * fall + 1 / factor)
