"""Settings of the command ``simulate``."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tightrec.serving.load.arrivals import LoadConfig
from tightrec.serving.paths import QUALITIES, Quality
from tightrec.serving.scheduling.config import SchedulerConfig, scheduler_config

DEVICE = re.compile(r"^(?:(\d+)x\s*)?([A-Za-z]\w*)(?:\((.*)\))?$")
"""``[COUNTx]NAME[(setting=value,...)]``."""


@dataclass(frozen=True, kw_only=True)
class AssumedDevice:
    """Devices derived from a measured one, such as ``2xgpu(speed=20,overhead_ms=0.3)``."""

    name: str
    """The first is called ``NAME:0``."""

    count: int = 1
    """How many."""

    speed: float = 10.0
    """How many times as fast as the measured device a batch's rows are scored."""

    overhead_ms: float = 0.5
    """What a batch takes besides."""


@dataclass(frozen=True, kw_only=True)
class SimulateConfig(LoadConfig):
    """``simulate``: run the scheduler on profiles, without computing anything."""

    paths: tuple[Path, ...]
    """Files of paths, measured or recorded; their devices stand side by side."""

    devices: tuple[str, ...] = ()
    """Devices to simulate, such as [cpu,2xgpu(speed=20,overhead_ms=0.3)]: a name in the files, or assumed
    ones with a speed, derived from ``source``; none: all in the files."""

    source: str = "cpu"
    """The measured device that assumed ones are derived from."""

    policy: tuple[str, ...] = ("multi",)
    """Rules to compare on the same queries: multi, greedy, fastest, random, oracle, fixed:NAME."""

    rank: Quality = "accuracy"
    """By what paths are better: accuracy, auc or ne."""

    batch_rows: int = 4096
    """Rows in a batch at most."""

    queue_rows: int = 65_536
    """Rows that may wait."""

    headroom: float = 0.9
    """Share of the compute that multi may use up with paths dearer than the cheapest."""

    shed: bool = True
    """Refuse what cannot meet its target."""

    batching: bool = True
    """Score queries that wait together."""

    noise: bool = True
    """Draw durations through the median and the 99th percentile; false: always the median."""

    contention: float = 0.0
    """How much longer a batch takes, as a share, if all other slots of its device are busy."""

    overhead_ms: float = 0.0
    """Added to every query's latency, such as for its way to the server and back."""

    out: Path | None = None
    """Where to write the figures as JSON; null: nowhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.paths:
            raise ValueError("paths is empty. Give at least one file that explore wrote.")
        if not self.policy:
            raise ValueError("policy is empty. Give at least one, such as multi.")
        if self.rank not in QUALITIES:
            raise ValueError(f"rank={self.rank!r} is none of {', '.join(QUALITIES)}.")
        for policy in self.policy:
            self.scheduler(policy)
        for name in ("contention", "overhead_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number of at least 0.")
        for word in self.devices:
            parse_device(word)

    def scheduler(self, policy: str) -> SchedulerConfig:
        """Settings of the scheduler under ``policy``."""
        return scheduler_config(self, policy=policy)


def parse_device(word: str) -> str | AssumedDevice:
    """A word of ``devices``: the name of a device in the files, or assumed ones.

    Raises:
        ValueError: neither, or a setting that is not there; says what is.
    """
    found = DEVICE.match(word)
    if found is None or (found[1] is None and found[3] is None):
        if not word or set("()=,") & set(word):
            raise ValueError(f"device {word!r} is not of the form NAME or 2xNAME(speed=20,overhead_ms=0.3).")
        return word
    settings = {"speed": AssumedDevice.speed, "overhead_ms": AssumedDevice.overhead_ms}
    for part in filter(None, (found[3] or "").split(",")):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in settings:
            raise ValueError(f"device {word!r}: there is no setting {key!r}, only {', '.join(settings)}.")
        try:
            settings[key] = float(value)
        except ValueError:
            raise ValueError(f"device {word!r}: {key}={value!r} is not a number.") from None
        if not (settings[key] > 0 and math.isfinite(settings[key])):
            raise ValueError(f"device {word!r}: {key} must be a finite number above 0.")
    count = int(found[1] or 1)
    if not 1 <= count <= 64:
        raise ValueError(f"device {word!r}: the number of devices must be 1 to 64.")
    return AssumedDevice(name=found[2], count=count, **settings)
