"""Configuration of what a run leaves behind."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is measured how often, and where it goes beside ``metrics.jsonl`` and ``run.json``."""

    every_steps: int = 20
    """Steps between records of loss, NE, rows/s and bytes; each is one small collective."""

    split_every: int = 100
    """Steps between profiled steps, whose time is split by part; 0: never."""

    plain_every_s: float = 10.0
    """Seconds between progress lines where the console is no terminal; a terminal has one live line."""

    tensorboard: bool = True
    """Write TensorBoard scalars to the folder ``tensorboard`` of the run."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"logging.every_steps={self.every_steps} must be at least 1.")
        if self.split_every < 0:
            raise ValueError(f"logging.split_every={self.split_every} must be 0 (never) or more.")
        if self.plain_every_s < 0:
            raise ValueError(f"logging.plain_every_s={self.plain_every_s} must be 0 (every record) or more.")
