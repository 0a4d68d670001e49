"""A step's time goes to exactly one part at each instant, and only sampled steps are profiled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile, record_function

from tightrec.trainer.step_split import PARTS, STEP, Event, TimeSplit, mean, split_step
from tightrec.trainer.timing import StepProfiler

MS = 1_000_000


def host(name: str, start_ms: float, end_ms: float, thread: int = 1, id: int = 0) -> Event:
    return Event(name=name, start_ns=int(start_ms * MS), end_ns=int(end_ms * MS), thread=thread, id=id)


def kernel(name: str, start_ms: float, end_ms: float, launched_by: int) -> Event:
    return Event(
        name=name,
        start_ns=int(start_ms * MS),
        end_ns=int(end_ms * MS),
        kernel=True,
        launched_by=launched_by,
    )


def parts(split: TimeSplit) -> dict[str, float]:
    """The parts that took any time."""
    return {part: pytest.approx(getattr(split, part)) for part in PARTS if getattr(split, part)}


def test_a_step_without_events_is_other() -> None:
    assert split_step([host(STEP, 5, 8)]) == TimeSplit(other=3.0)


def test_the_innermost_named_event_decides_and_unnamed_ones_follow_what_they_stand_in() -> None:
    split = split_step(
        [
            host(STEP, 0, 100),
            host("tightrec::data", 0, 10),
            host("aten::cat", 2, 5),
            host("## forward 4 ##", 10, 60),
            host("[lookup]_[ebc]_[table_wise]", 15, 25),
            host("aten::empty", 16, 17),
            host("aten::mm", 30, 40),
            host("## EmbeddingBagCollectionAwaitable wait() ##", 45, 60),
            host("[output_dist_wait]_[ebc]_[table_wise]", 46, 59),
            host("aten::add", 70, 80),
            host("## optimizer 4 ##", 90, 99),
        ]
    )
    assert parts(split) == {
        "data": 10,
        "lookup": 10,
        "dense": 5 + 20 + 10,
        "embedding_exchange": 15,
        "optimizer": 9,
        "other": 10 + 10 + 1,
    }
    assert split.total == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("## copy_batch_to_gpu 6 ##", "data"),
        ("[splits_dist]_[model.ebc]_[row_wise]", "input_exchange"),
        ("## all2all_data:kjt splits ##", "input_exchange"),
        ("## KJTListSplitsAwaitable wait() ##", "input_exchange"),
        ("## FusedKJTListSplitsAwaitable wait() ##", "input_exchange"),
        ("## SplitsAllToAllAwaitable wait() ##", "input_exchange"),
        ("## start_sparse_data_dist 5 ##", "input_exchange"),
        ("## wait_sparse_data_dist 5 ##", "input_exchange"),
        ("[lookup]_[model.ebc]_[row_wise]", "lookup"),
        ("fbgemm::split_embedding_codegen_lookup_rowwise_adagrad_function_pt2", "lookup"),
        ("fbgemm::bounds_check_indices", "lookup"),
        ("[output_dist]_[model.ebc]_[row_wise]", "embedding_exchange"),
        ("All2All_Pooled_Req", "embedding_exchange"),
        ("ReduceScatterBase_Wait", "embedding_exchange"),
        ("## All2All_Pooled_fwd ##", "embedding_exchange"),
        ("## ReduceScatterBase_fwd (tensor) ##", "embedding_exchange"),
        ("## PooledEmbeddingsAwaitable wait() ##", "embedding_exchange"),
        ("## all2all_pooled ##", "embedding_exchange"),
        ("All2All_Pooled_WaitBackward", "backward_exchange"),
        (
            "autograd::engine::evaluate_function: Variable_Batch_All2All_Pooled_ReqBackward",
            "backward_exchange",
        ),
        ("autograd::engine::evaluate_function: ReduceScatterBase_ReqBackward", "backward_exchange"),
        ("## All2All_Pooled_bwd ##", "backward_exchange"),
        ("## AllGatherBase_bw (reduce_scatter_tensor) ##", "backward_exchange"),
        ("torch::autograd::CppNode<SplitLookupFunction_rowwise_adagrad_Op_pt2>", "optimizer"),
        ("fbgemm::split_embedding_backward_codegen_rowwise_adagrad_cpu", "optimizer"),
        ("torch::autograd::CppNode<SplitLookupFunction_dense_Op>", "lookup"),
        ("Optimizer.step#CombinedOptimizer.step", "optimizer"),
        ("## zero_grad ##", "optimizer"),
        ("tightrec::backward_exchange", "backward_exchange"),
        ("tightrec::something", "other"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "dense"),
        ("c10d::allreduce_", "dense"),
    ],
)
def test_names_that_torchrec_and_fbgemm_record(name: str, part: str) -> None:
    inside = [host(STEP, 0, 10), host("## forward ##", 0, 10), host(name, 2, 5)]
    expected = {"dense": 10.0} if part == "dense" else {"dense": 7.0, part: 3.0}
    assert parts(split_step(inside)) == expected


def test_what_works_beside_the_step_is_left_out() -> None:
    split = split_step([host(STEP, 0, 10), host("aten::copy_", 2, 9, thread=7), host("aten::mm", 0, 4)])
    assert split == TimeSplit(dense=4.0, other=6.0)


def test_autograds_own_thread_holds_the_step_while_the_main_thread_waits_for_it() -> None:
    split = split_step(
        [
            host(STEP, 0, 20),
            host("## backward 1 ##", 0, 20),
            host("autograd::engine::evaluate_function: All2All_Pooled_WaitBackward", 5, 11, thread=2),
            host("autograd::engine::evaluate_function: AddmmBackward0", 12, 15, thread=2),
        ]
    )
    assert split == TimeSplit(dense=14.0, backward_exchange=6.0)


def test_on_a_device_computing_kernels_hide_exchanges_and_exchanges_hide_the_host() -> None:
    split = split_step(
        [
            host(STEP, 0, 30),
            host("[output_dist]_[ebc]_[table_wise]", 0, 2, id=1),
            host("aten::mm", 2, 4, id=2),
            host("## optimizer ##", 4, 5, id=3),
            kernel("ncclDevKernel_SendRecv", 2, 14, launched_by=1),
            kernel("update", 8, 12, launched_by=3),
            kernel("update", 20, 25, launched_by=3),
            kernel("late", 28, 40, launched_by=2),
            kernel("of nobody known", 26, 27, launched_by=99),
        ]
    )
    assert parts(split) == {
        "embedding_exchange": 2 + (14 - 2 - 4),
        "dense": 2,
        "optimizer": 4 + 5,
        "other": 6 + 1 + 1 + 1,
    }
    assert split.total == pytest.approx(30)


intervals = st.tuples(st.integers(-5, 25), st.integers(0, 20))


@given(
    on_host=st.lists(st.tuples(st.sampled_from(["aten::mm", "[lookup]_x", "## optimizer ##"]), intervals)),
    on_autograd=st.lists(intervals),
    on_device=st.lists(st.tuples(st.sampled_from(["gemm", "nccl"]), st.integers(0, 9), intervals)),
)
def test_the_parts_sum_to_the_step_whatever_was_recorded(
    on_host: list[tuple[str, tuple[int, int]]],
    on_autograd: list[tuple[int, int]],
    on_device: list[tuple[str, int, tuple[int, int]]],
) -> None:
    events = [host(STEP, 0, 20)]
    events += [host(name, at, at + took, id=i) for i, (name, (at, took)) in enumerate(on_host, start=1)]
    events += [host("autograd::engine::run", at, at + took, thread=2) for at, took in on_autograd]
    events += [kernel(name, at, at + took, launcher) for name, launcher, (at, took) in on_device]
    assert split_step(events).total == pytest.approx(20)


def test_the_mean_is_taken_part_by_part() -> None:
    assert mean([TimeSplit(data=1.0, dense=4.0), TimeSplit(dense=2.0)]) == TimeSplit(data=0.5, dense=3.0)


def work() -> None:
    with record_function("tightrec::data"):
        torch.ones(10).sum()
    torch.ones(8, 8) @ torch.ones(8, 8)


def test_every_nth_step_is_sampled() -> None:
    profiler = StepProfiler(3, torch.device("cpu"))
    sampled = []
    for step in range(7):
        with profiler.step(step):
            work()
        split = profiler.take()
        if split is not None:
            sampled.append(step)
            assert split.data > 0
            assert split.dense > 0
    assert sampled == [2, 5]


def test_a_step_that_is_not_sampled_is_not_touched() -> None:
    off = StepProfiler(0, torch.device("cpu"))
    rare = StepProfiler(5, torch.device("cpu"))
    for profiler in (off, rare):
        for step in range(4):
            with profiler.step(step):
                assert not torch.autograd._profiler_enabled()
        assert profiler.take() is None


def test_a_step_under_another_profiler_is_left_to_it() -> None:
    profiler = StepProfiler(1, torch.device("cpu"))
    with profile() as other, profiler.step(0):
        work()
    assert profiler.take() is None
    assert "tightrec::data" in {event.name for event in other.events()}


def test_a_failing_step_leaves_the_profiler_usable() -> None:
    profiler = StepProfiler(1, torch.device("cpu"))
    with pytest.raises(StopIteration), profiler.step(0):
        raise StopIteration
    with profiler.step(1):
        work()
    split = profiler.take()
    assert split is not None
    assert split.data > 0
