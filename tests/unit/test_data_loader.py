"""The loader: every row once over ranks and workers, exact resumes, nothing left running."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from numbered import Numbered, all_rows, rows_of

from tightrec.trainer.data.batch import Batch
from tightrec.trainer.data.loader import Loader, LoaderConfig
from tightrec.trainer.data.shards import Position

UNEVEN = [11, 3, 7, 1, 20, 5, 9]
CONFIG = LoaderConfig(batch_size=4, shuffle_groups=2, seed=5, prefetch=3)


def loaders(source: Numbered, world: int, config: LoaderConfig = CONFIG) -> list[Loader]:
    return [Loader(source, config, rank, world) for rank in range(world)]


def background() -> list[str]:
    threads = [t.name for t in threading.enumerate() if t.name.startswith("tightrec-data")]
    return threads + [p.name for p in multiprocessing.active_children()]


def assert_nothing_runs() -> None:
    deadline = time.monotonic() + 10
    while background() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert background() == []


# Starting processes costs: with workers only the telling cases; test_data_shards covers the other topologies.
@pytest.mark.parametrize(
    ("counts", "world", "workers"),
    [
        *((counts, world, 0) for counts in (UNEVEN, [6], [2], []) for world in (1, 2, 3, 5)),
        *((UNEVEN, world, workers) for world in (2, 3, 5) for workers in (1, 2)),
        ([2], 3, 2),
        ([], 2, 1),
    ],
)
def test_ranks_and_workers_together_read_every_row_once(counts: list[int], world: int, workers: int) -> None:
    source = Numbered(counts)
    ranks = loaders(source, world, replace(CONFIG, workers=workers))
    position = ranks[0].start(0)
    read = [all_rows(rank.iterate(position)) for rank in ranks]
    assert sorted(row for rank in read for batch in rank for row in batch) == list(range(sum(counts)))
    assert [len(rank) for rank in read] == [rank.batches(position) for rank in ranks]
    assert all(len(batch) == 4 for rank in read for batch in rank[:-1])
    sizes = [sum(len(batch) for batch in rank) for rank in read]
    assert max(sizes) - min(sizes) <= 1
    assert_nothing_runs()


def test_same_seed_same_order_other_seed_or_epoch_another() -> None:
    source = Numbered(UNEVEN)

    def read(seed: int, epoch: int) -> list[list[int]]:
        loader = Loader(source, replace(CONFIG, seed=seed), 0, 2)
        return all_rows(loader.iterate(loader.start(epoch)))

    assert read(1, 0) == read(1, 0)
    assert read(1, 0) != read(1, 1)
    assert read(1, 0) != read(2, 0)
    assert read(1, 0) != sorted(read(1, 0))


def test_shuffling_mixes_rows_of_different_groups() -> None:
    loader = Loader(Numbered([16] * 4), replace(CONFIG, shuffle_groups=4, batch_size=16), 0, 1)
    first = next(iter(all_rows(loader.iterate(loader.start(0)))))
    assert len({row // 16 for row in first}) > 1


def test_without_shuffling_one_rank_reads_in_the_order_of_the_data() -> None:
    loader = Loader(Numbered(UNEVEN), replace(CONFIG, shuffle=False), 0, 1)
    for epoch in (0, 1):
        read = all_rows(loader.iterate(loader.start(epoch)))
        assert [row for batch in read for row in batch] == list(range(sum(UNEVEN)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_resume_after_any_batch_continues_the_very_same_batches(world: int) -> None:
    for rank, loader in enumerate(loaders(Numbered(UNEVEN), world)):
        start = loader.start(3)
        whole = all_rows(loader.iterate(start))
        for taken in range(len(whole) + 1):
            # Through JSON's types, as a checkpoint has it.
            position = Position.from_dict(loader.advance(start, [taken] * world).to_dict())
            assert all_rows(loader.iterate(position)) == whole[taken:], (rank, taken)
            assert loader.batches(position) == len(whole) - taken


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_resume_with_workers_continues_the_very_same_batches(taken: int) -> None:
    loader = Loader(Numbered(UNEVEN), replace(CONFIG, workers=2), 1, 2)
    whole = all_rows(loader.iterate(loader.start(0)))
    assert len(whole) == 7
    resumed = loader.iterate(loader.advance(loader.start(0), [taken, taken]))
    assert all_rows(resumed) == whole[taken:]


def test_a_thread_and_one_worker_make_the_same_batches() -> None:
    source = Numbered(UNEVEN)
    thread, worker = (Loader(source, replace(CONFIG, workers=n), 0, 2) for n in (0, 1))
    assert all_rows(thread.iterate(thread.start(0))) == all_rows(worker.iterate(worker.start(0)))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("batch_size", [4, 3])
def test_resume_on_other_ranks_or_batches_sees_exactly_the_remaining_rows(
    before: int, after: int, batch_size: int
) -> None:
    source = Numbered(UNEVEN)
    old = loaders(source, before)
    new = loaders(source, after, replace(CONFIG, batch_size=batch_size))
    for steps in range(max(rank.batches(rank.start(0)) for rank in old) + 1):
        start = old[0].start(0)
        seen = [row for r in old for batch in islice(r.iterate(start), steps) for row in rows_of(batch)]
        position = Position.from_dict(old[0].advance(start, [steps] * before).to_dict())
        # And once more, in the middle of the second phase.
        middle = new[0].advance(position, [1] * after)
        for rank in new:
            seen += [row for batch in islice(rank.iterate(position), 1) for row in rows_of(batch)]
        last = loaders(source, before)
        seen += [row for rank in last for batch in all_rows(rank.iterate(middle)) for row in batch]
        assert sorted(seen) == list(range(sum(UNEVEN))), steps


def test_steps_pads_a_rank_that_runs_out_and_cuts_one_that_does_not() -> None:
    ranks = loaders(Numbered([5]), 3)
    start = ranks[0].start(0)
    assert [rank.batches(start) for rank in ranks] == [1, 1, 1]
    ranks = loaders(Numbered([1]), 3)
    start = ranks[0].start(0)
    assert [rank.batches(start) for rank in ranks] == [1, 0, 0]
    assert [all_rows(rank.iterate(start, steps=2)) for rank in ranks] == [[[0], []], [[], []], [[], []]]
    loader = loaders(Numbered(UNEVEN), 1)[0]
    assert all_rows(loader.iterate(loader.start(0), 3)) == all_rows(loader.iterate(loader.start(0)))[:3]
    assert list(loader.iterate(loader.start(0), 0)) == []
    assert_nothing_runs()


def test_padding_batches_are_not_counted_by_advance() -> None:
    ranks = loaders(Numbered([1]), 2)
    end = ranks[0].advance(ranks[0].start(0), [5, 5])
    assert end.consumed == (1, 0)
    assert [rank.batches(end) for rank in ranks] == [0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_early_ends_threads_and_processes(workers: int) -> None:
    loader = Loader(Numbered([50] * 20), replace(CONFIG, workers=workers), 0, 1)
    batches = loader.iterate(loader.start(0))
    assert len(rows_of(next(batches))) == 4
    assert background()
    batches.close()  # type: ignore[attr-defined]
    assert_nothing_runs()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_the_consumer_ends_threads_and_processes(workers: int) -> None:
    loader = Loader(Numbered([50] * 20), replace(CONFIG, workers=workers), 0, 1)

    def consume() -> None:
        for _ in loader.iterate(loader.start(0)):
            raise KeyError("the step failed")

    with pytest.raises(KeyError, match="the step failed"):
        consume()
    assert_nothing_runs()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_bad_data_is_told_in_the_sources_own_words_after_the_good_batches(workers: int) -> None:
    config = replace(CONFIG, workers=workers, shuffle=False)
    loader = Loader(Numbered([8] * 6, bad_group=4), config, 0, 1)
    batches = loader.iterate(loader.start(0))
    # With two workers, 0 reads groups 0, 2, 4 and 1 the others; the one with group 4 stops short.
    good = [rows_of(batch) for batch in islice(batches, 8)]
    assert sorted(row for batch in good for row in batch) == list(range(32))
    with pytest.raises(ValueError, match=r"^row group 4 is rotten\. Throw it away\.$"):
        next(batches)
    assert_nothing_runs()


PROGRAM = """
import multiprocessing, signal, sys
sys.path.insert(0, {folder!r})
from numbered import Numbered, rows_of
from tightrec.trainer.data.loader import Loader, LoaderConfig

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
    loader = Loader(Numbered([50] * 20), LoaderConfig(batch_size=4, workers=2, prefetch=2), 0, 1)
    batches = loader.iterate(loader.start(0))
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    print(1 + sum(1 for _ in batches), flush=True)
    kept = loader.iterate(loader.start(0))
    next(kept)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    raise KeyError("the step failed")
"""


@contextmanager
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own that reads with two workers, as torchrun makes one of each rank."""
    program = tmp_path / "job.py"
    program.write_text(PROGRAM.format(folder=str(Path(__file__).parent)))
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, program], stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def running(pids: list[int]) -> list[int]:
    """Those that have not ended; one that has may stay listed as a zombie where nobody collects it."""
    alive = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            alive += [pid] if state != "Z" else []
    return alive


def test_workers_outlive_a_sigterm_to_the_whole_job_but_not_the_job(tmp_path: Path) -> None:
    with job(tmp_path) as process:
        first = [int(pid) for pid in line(process).split()]
        os.killpg(process.pid, signal.SIGTERM)
        assert line(process) == "asked to stop"
        go_on(process)
        assert line(process) == "250", "batches of the epoch"
        second = [int(pid) for pid in line(process).split()]
        assert len(first) == len(second) == 2
        # A traceback keeps the iterator, and with it the workers, to the very end of the process.
        go_on(process)
        assert process.wait(60) == 1
        wait_until(lambda: not running(first + second))
        assert running(first + second) == []
        assert "the step failed" in process.stderr.read()  # type: ignore[union-attr]


def test_workers_do_not_outlive_a_killed_rank(tmp_path: Path) -> None:
    with job(tmp_path) as process:
        workers = [int(pid) for pid in line(process).split()]
        assert len(running(workers)) == 2
        process.kill()
        wait_until(lambda: not running(workers))
        assert running(workers) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(workers: int) -> None:
    loader = Loader(Numbered([8]), replace(CONFIG, workers=workers), 0, 1)
    before = torch.get_rng_state()
    list(loader.iterate(loader.start(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_prefetching_reads_ahead_but_no_further_than_told() -> None:
    source = Numbered([4] * 12)
    made: list[int] = []
    read = source.read
    source.read = lambda group: (made.append(group), read(group))[1]  # type: ignore[method-assign]
    loader = Loader(source, replace(CONFIG, shuffle=False), 0, 1)
    batches = loader.iterate(loader.start(0))
    next(batches)
    wait_until(lambda: len(made) == 1 + CONFIG.prefetch)
    time.sleep(0.05)
    assert len(made) == 1 + CONFIG.prefetch
    batches.close()  # type: ignore[attr-defined]


def test_closing_early_does_not_first_make_what_was_asked_ahead() -> None:
    source = Numbered([4] * 40)
    made: list[int] = []
    read = source.read
    source.read = lambda group: (time.sleep(0.02), made.append(group), read(group))[2]  # type: ignore[method-assign]
    loader = Loader(source, replace(CONFIG, shuffle=False, prefetch=30), 0, 1)
    batches = loader.iterate(loader.start(0))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(made) < 30


def test_with_a_gpu_every_batch_is_pinned_on_a_thread_that_has_chosen_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[tuple[int, str]] = []
    pinned: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread().name))
    )
    monkeypatch.setattr(
        Batch, "pin_memory", lambda batch: pinned.append(threading.current_thread().name) or batch
    )
    loader = Loader(Numbered([8]), CONFIG, 0, 1, pin_memory=True)
    assert len(all_rows(loader.iterate(loader.start(0), steps=3))) == 3
    assert chosen == [(3, "tightrec-data_0")]
    assert pinned == ["tightrec-data_0"] * 2 + ["MainThread"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize(
    "setting", [{"batch_size": 0}, {"workers": -1}, {"prefetch": 0}, {"shuffle_groups": 0}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, int]) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"loader\.{name}={value} must be at least"):
        LoaderConfig(**setting)  # type: ignore[arg-type]
