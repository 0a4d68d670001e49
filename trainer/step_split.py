"""Where the time of one training step went, from the events that a profiler recorded.

The parts sum to the step's whole time: at each instant exactly one thing holds the step. That is, first of
those active:

1. a kernel on the device that computes,
2. a kernel on the device that communicates (exposed: nothing computes beside it),
3. the innermost recorded event of autograd's own thread (CUDA only; on CPU the main thread runs backward),
4. the innermost recorded event of the main thread.

A kernel belongs to what launched it. So an exchange is counted where the step waits for it, not where it
overlaps with something useful.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal[
    "data",
    "input_exchange",
    "lookup",
    "embedding_exchange",
    "dense",
    "backward_exchange",
    "optimizer",
    "other",
]
PARTS: tuple[Part, ...] = get_args(Part)

PREFIX = "tightrec::"
"""Events named ``tightrec::PART`` belong to that part."""

STEP = PREFIX + "step"
"""The event around the whole step."""

# In order: the first pattern that is found in a name decides. Names seen in torchrec 1.8 and fbgemm 1.8 under
# the plain loop, TrainPipelineBase and TrainPipelineSparseDist.
_NAMES: tuple[tuple[str, Part], ...] = (
    (r"^## (copy_batch|inplace_copy|load batch|load_batch|next_batch|wait_for_batch)", "data"),
    (r"^\[(splits_dist|input_dist)\]", "input_exchange"),
    (r"^## (all2all_data|dist_init|start_sparse_data_dist|wait_sparse_data_dist)", "input_exchange"),
    (r"^## (\w*KJT\w*Awaitable|SplitsAllToAllAwaitable|runtime_forward_assemble_KJT)", "input_exchange"),
    (r"(All2All|Alltoall|AllToAll|ReduceScatter|AllGather)\w*Backward", "backward_exchange"),
    (r"^## (All2All|Variable_Batch_All2All|ReduceScatter|AllGather)\w*_bw", "backward_exchange"),
    (r"^(All2All|Variable_Batch_All2All|ReduceScatter|AllGather)\w*_(Req|Wait)$", "embedding_exchange"),
    (r"^## (All2All|Variable_Batch_All2All|ReduceScatter|AllGather)\w*_fwd", "embedding_exchange"),
    (r"^\[output_dist\]", "embedding_exchange"),
    (r"^## (all2all_|variable_batch_all2all_|reduce_scatter|all_gather)", "embedding_exchange"),
    (r"^## (Embedding\w*|PooledEmbeddings\w*|SequenceEmbeddings\w*)Awaitable", "embedding_exchange"),
    (r"^\[lookup\]|SplitLookupFunction_dense|^fbgemm::\w*(dense_embedding|bounds_check)", "lookup"),
    (r"SplitLookupFunction|^fbgemm::split_embedding_backward", "optimizer"),
    (r"^fbgemm::split_embedding_codegen", "lookup"),
    (r"^## (optimizer|zero_grad)|^Optimizer\.", "optimizer"),
)
_PATTERNS = tuple((re.compile(pattern), part) for pattern, part in _NAMES)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that a profiler recorded."""

    name: str
    start_ns: int
    end_ns: int

    thread: int = 0
    """Host thread; of no meaning for a kernel."""

    kernel: bool = False
    """Whether it ran on the device."""

    id: int = 0
    """Of a host event: what a kernel launched by it carries as ``launched_by``; 0: none."""

    launched_by: int = 0
    """Of a kernel: the ``id`` of the host event that launched it."""


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Milliseconds of one step, or the mean over several, by part; the parts sum to the step."""

    data: float = 0.0
    """Waiting for a batch, and its copy to the device."""

    input_exchange: float = 0.0
    """Sending ids to the ranks that hold their tables."""

    lookup: float = 0.0
    """Forward of the tables."""

    embedding_exchange: float = 0.0
    """Sending pooled embeddings to the ranks that hold the rows."""

    dense: float = 0.0
    """Dense layers, interaction and loss, forward and backward, with the all-reduce of their gradients."""

    backward_exchange: float = 0.0
    """Sending the gradients of the pooled embeddings back, with waiting for ranks that are not there yet."""

    optimizer: float = 0.0
    """Update of the dense layers; backward of the tables, into which fbgemm fuses their update."""

    other: float = 0.0
    """Outside all that was recorded: Python between the parts."""

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, part) for part in PARTS)


def mean(splits: Iterable[TimeSplit]) -> TimeSplit:
    """The mean of at least one split, part by part."""
    splits = list(splits)
    assert splits, "no splits to average"
    return TimeSplit(**{part: sum(getattr(s, part) for s in splits) / len(splits) for part in PARTS})


def split_step(events: Iterable[Event]) -> TimeSplit:
    """Split the step around which an event named :data:`STEP` was recorded.

    Events of host threads nest properly. Those of threads that neither ran the step nor autograd are left
    out: they work beside it.
    """
    events = list(events)
    (step,) = (event for event in events if event.name == STEP and not event.kernel)
    spans: list[tuple[tuple[int, int, Part], int, int]] = []
    part_of: dict[int, Part] = {}
    autograd = {event.thread for event in events if event.name.startswith("autograd::engine")}
    for lane, threads in ((2, autograd - {step.thread}), (3, {step.thread})):
        for thread in threads:
            own = [event for event in events if not event.kernel and event.thread == thread]
            for event, part, depth in _nested(own):
                part_of[event.id] = part
                spans.append(((lane, -depth, part), event.start_ns, event.end_ns))
    for event in events:
        if event.kernel:
            lane = 1 if "nccl" in event.name.lower() else 0
            spans.append(((lane, 0, part_of.get(event.launched_by, "other")), event.start_ns, event.end_ns))
    held: Counter[Part] = Counter()
    for part, ns in _sweep(spans, step.start_ns, step.end_ns):
        held[part] += ns
    return TimeSplit(**{part: held[part] / 1e6 for part in PARTS})


def _nested(events: list[Event]) -> Iterable[tuple[Event, Part, int]]:
    """Part and depth of each event of one thread: its name's, else the one it stands in, else dense."""
    open_: list[tuple[int, Part]] = []
    for event in sorted(events, key=lambda e: (e.start_ns, -e.end_ns)):
        while open_ and open_[-1][0] <= event.start_ns:
            open_.pop()
        around: Part = open_[-1][1] if open_ else "other"
        part = _named(event.name) or ("dense" if around == "other" else around)
        yield event, part, len(open_)
        open_.append((event.end_ns, part))


def _named(name: str) -> Part | None:
    if name.startswith(PREFIX):
        own = name.removeprefix(PREFIX)
        return next((part for part in PARTS if part == own), "other")
    return next((part for pattern, part in _PATTERNS if pattern.search(name)), None)


def _sweep(
    spans: list[tuple[tuple[int, int, Part], int, int]], begin: int, end: int
) -> Iterable[tuple[Part, int]]:
    """Nanoseconds in which each part held the stretch from ``begin`` to ``end``, piece by piece.

    Of the spans active at an instant the one with the least key holds it.
    """
    edges = sorted(
        (min(max(time, begin), end), change, key)
        for key, start, stop in spans
        for time, change in ((start, 1), (stop, -1))
    )
    active: Counter[tuple[int, int, Part]] = Counter()
    before = begin
    for time, change, key in edges:
        if time > before:
            yield min(active)[2], time - before
            before = time
        active[key] += change
        if not active[key]:
            del active[key]
