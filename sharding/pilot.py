"""What the wires of a module ask in every step: bounds and modes by table, and what to measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tightrec.compression.bounds import Bounds
from tightrec.compression.codec import Mode, Modes
from tightrec.compression.policy.config import Direction
from tightrec.compression.policy.policy import BoundPolicy
from tightrec.sharding.config import FRAMED, CodecConfig
from tightrec.sharding.measures import Measures


@dataclass
class Pilot:
    """The settings of the step under way."""

    config: CodecConfig
    policy: BoundPolicy
    measures: Measures
    step: int = 0
    """Training steps begun before this one; of messages, schedules and samples. The backward of a step comes
    under the same number."""

    begun: int = 0
    """Training steps begun so far, the one under way included."""

    training: bool = True
    """Whether the forward under way belongs to a training step."""

    exact: bool = False
    """Whether forward frames are to be lossless, as in a probe."""

    plain: dict[Direction, bool] = field(default_factory=lambda: {"forward": False, "backward": False})
    """Directions that ``auto`` sends uncompressed at present."""

    sizes_wanted: bool = False
    """Whether frames are looked into whatever the sampling says."""

    trial: Callable[[Direction, str, Tensor], None] | None = None
    """Takes a table's first rows in this step, for a comparison of modes."""

    sampling_rows: bool = False
    """Whether the policy wants to see the rows that are sent forward."""

    plain_now: bool | None = None
    """What a step does whatever ``plain`` says, so that ``auto`` sees both; None: as ``plain`` says."""

    modes_by_table: dict[Direction, dict[str, Mode]] = field(
        default_factory=lambda: {"forward": {}, "backward": {}}
    )
    """Modes chosen for tables (``measured``, ``published``)."""

    modes_version: int = 0
    """Another number whenever ``modes_by_table`` or ``exact`` changed."""

    _modes: dict[tuple[object, ...], Modes] = field(default_factory=dict)

    def bounds(
        self, direction: Direction, tables: Sequence[str], slots: Sequence[str], share: float
    ) -> Bounds:
        """Error bounds of the step, of ``slots`` that hold columns of ``tables``."""
        return self.policy.bounds(direction, tables, slots, share)

    def modes(self, direction: Direction, tables: Sequence[str], slots: Sequence[str]) -> Modes:
        """Modes of the step; lossless tables are raw whatever was chosen."""
        exact = self.exact and direction == "forward"
        key = (direction, tuple(tables), tuple(slots), exact, self.modes_version)
        found = self._modes.get(key)
        if found is None:
            if len(self._modes) > 256:
                self._modes.clear()
            lossless = self.policy.lossless(direction, tables)
            chosen = self.modes_by_table[direction]
            found = self._modes[key] = Modes(
                tuple(
                    "raw" if exact or whole else chosen.get(table, self._default)
                    for table, whole in zip(tables, lossless, strict=True)
                ),
                tuple(slots),
            )
        return found

    def sends_plain(self, direction: Direction) -> bool:
        """Whether ``auto`` leaves this step's exchange uncompressed."""
        return self.plain[direction] if self.plain_now is None else self.plain_now

    @property
    def what(self) -> str:
        """The step, for messages."""
        return f"step {self.step + 1}" if self.training else f"an evaluation after step {self.begun}"

    @property
    def _default(self) -> Mode:
        mode = self.config.mode
        # Until something is measured: the smallest.
        return "auto" if mode == "measured" or mode == "published" else mode

    @property
    def sampled(self) -> bool:
        """Whether the frames of this step are looked into."""
        every = self.config.stats_every
        return self.training and (self.sizes_wanted or (every > 0 and self.step % every == 0))

    def samples(self, direction: Direction) -> bool:
        """Whether there are frames in this direction to be looked into in this step."""
        codec = getattr(self.config, direction)
        plain = codec not in FRAMED or (codec == "auto" and self.sends_plain(direction))
        return self.sampled and not plain

    @property
    def shadowed(self) -> bool:
        """Whether this step's true errors are compared with the bounds."""
        every = self.config.shadow_every
        return self.training and every > 0 and self.step % every == 0
