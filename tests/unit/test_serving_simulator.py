"""The simulator, assumed devices, and the command that runs it."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_paths_made import made_cpu, made_path, poisson, usual_cpu, with_gpu

from tightrec.formats.settings import from_words
from tightrec.serving.paths import Profile, ServingPath, write_paths
from tightrec.serving.scheduling.queues import Query
from tightrec.serving.scheduling.scheduler import SchedulerConfig
from tightrec.serving.scheduling.simulate import simulate_command
from tightrec.serving.scheduling.simulate_config import AssumedDevice, SimulateConfig, parse_device
from tightrec.serving.scheduling.simulator import ProfileDurations, merged, scaled, simulate

EXACT = ProfileDurations(noise=False)


def test_three_queries_by_hand() -> None:
    """1 ms and 10 us a row on one slot: the second and third wait and are scored together."""
    paths = made_cpu(made_path("only", 1.0, 10, 0.8), slots=1)
    queries = [Query(0, 100, 0.0, 0.01), Query(1, 100, 0.001, 0.01), Query(2, 100, 0.0015, 0.01)]
    done = simulate(paths, SchedulerConfig(), queries, EXACT)
    assert [outcome.finished for outcome in done.outcomes] == pytest.approx([0.002, 0.005, 0.005])
    assert done.batches == 2
    assert done.busy_s == {"cpu": pytest.approx(0.005)}
    assert done.finished_s == pytest.approx(0.005)


def test_overhead_lengthens_latency_but_occupies_nothing() -> None:
    paths = made_cpu(made_path("only", 1.0, 10, 0.8), slots=1)
    done = simulate(paths, SchedulerConfig(), [Query(0, 100, 0.0, 0.01)], EXACT, overhead_s=0.004)
    assert done.outcomes[0].latency_s == pytest.approx(0.006)
    assert done.busy_s == {"cpu": pytest.approx(0.002)}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([100.0, 1000.0, 5000.0]),
    target_ms=st.sampled_from([4.0, 10.0, 40.0]),
    policy=st.sampled_from(["multi", "greedy", "fastest", "random", "oracle"]),
    gpu=st.booleans(),
)
def test_with_exact_durations_nothing_served_is_late(
    seed: int, rate: float, target_ms: float, policy: str, gpu: bool
) -> None:
    paths = with_gpu() if gpu else usual_cpu()
    queries = poisson(rate, 0.3, target_ms, seed)
    done = simulate(paths, SchedulerConfig(policy=policy), queries, EXACT)
    assert len(done.outcomes) == len(queries)
    for outcome in done.outcomes:
        assert (outcome.finished is None) != (outcome.shed is None)
        assert outcome.shed is not None or outcome.in_target


def test_the_same_seed_gives_the_same_outcomes() -> None:
    def outcomes(seed: int) -> object:
        model = ProfileDurations(seed=seed)
        return simulate(usual_cpu(1.3), SchedulerConfig(), poisson(2000, 0.5, 10), model).outcomes

    assert outcomes(1) == outcomes(1) != outcomes(2)


def test_queries_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="in the order of their arrival"):
        simulate(usual_cpu(), SchedulerConfig(), [Query(0, 1, 1.0, 1.0), Query(1, 1, 0.5, 1.0)])


def test_durations_meet_the_median_and_the_99th_percentile() -> None:
    path = made_path("only", 1.0, 10, 0.8, tail=1.5)
    drawn = sorted(ProfileDurations(seed=3)(path, 100, number, 0.0) for number in range(20_000))
    assert statistics.median(drawn) == pytest.approx(2e-3, rel=0.02)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(3e-3, rel=0.03)


def test_contention_lengthens_batches_beside_others() -> None:
    path = made_path("only", 1.0, 10, 0.8)
    model = ProfileDurations(noise=False, contention=0.5)
    assert model(path, 100, 0, 1.0) == pytest.approx(3e-3)
    assert model(path, 100, 0, 0.0) == pytest.approx(2e-3)
    queries = [Query(0, 100, 0.0, 1.0), Query(1, 100, 0.0, 1.0)]
    done = simulate(made_cpu(path), SchedulerConfig(), queries, model)
    assert [outcome.finished for outcome in done.outcomes] == pytest.approx([2e-3, 3e-3])


def test_a_scheduler_learns_that_the_machine_is_slower_than_its_profiles() -> None:
    paths = usual_cpu(1.2)

    def slower(path: ServingPath, rows: int, number: int, busy: float) -> float:
        return 1.6 * ProfileDurations()(path, rows, number, busy)

    done = simulate(paths, SchedulerConfig(), poisson(2000, 4, 10), slower)
    later = [outcome for outcome in done.outcomes if outcome.arrived > 1.0 and outcome.finished is not None]
    assert sum(not outcome.in_target for outcome in later) < 0.02 * len(later)


def test_an_assumed_device_is_faster_by_what_is_said_and_marked() -> None:
    cpu = usual_cpu(tail=1.5)
    gpu = scaled(cpu, "gpu:0", speed=10, overhead_ms=0.25)
    path = gpu.path("table@gpu:0")
    slow = cpu.path("table").profile
    assert path.profile.expected_ms(1) == pytest.approx(0.25)
    wanted = 0.25 + (slow.expected_ms(1024) - slow.expected_ms(1)) / 10
    assert path.profile.expected_ms(1024) == pytest.approx(wanted)
    assert path.profile.expected_tail_ms(1024) == pytest.approx(1.5 * wanted)
    assert path.threads == 1
    assert path.accuracy == cpu.path("table").accuracy
    assert gpu.devices[0].recorded
    assert "speed 10" in path.notes["assumed"]
    assert "speed 10" in merged([cpu, gpu]).notes["assumed"]["gpu:0"]
    with pytest.raises(ValueError, match="no path on tpu"):
        scaled(cpu, "gpu:0", speed=10, overhead_ms=0.25, source="tpu")
    with pytest.raises(ValueError, match="must be above 0"):
        scaled(cpu, "gpu:0", speed=0, overhead_ms=0.25)
    with pytest.raises(ValueError, match="have a device cpu"):
        merged([cpu, cpu])


def test_of_one_snapshot_the_path_with_the_fewest_threads_is_scaled() -> None:
    one = made_path("one", 1.0, 10, 0.8)
    two = dataclasses.replace(made_path("two", 1.0, 5, 0.8, threads=2), snapshot=one.snapshot)
    gpu = scaled(made_cpu(two, one), "gpu", speed=2, overhead_ms=1)
    assert [path.name for path in gpu.paths] == ["one@gpu"]


def test_words_for_devices() -> None:
    assert parse_device("cpu") == "cpu"
    assert parse_device("cuda:0") == "cuda:0"
    assert parse_device("2xgpu(speed=20, overhead_ms=0.3)") == AssumedDevice(
        name="gpu", count=2, speed=20, overhead_ms=0.3
    )
    assert parse_device("gpu(speed=4)") == AssumedDevice(name="gpu", speed=4)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("gpu(speed)", "speed='' is not a number"),
        ("gpu(pace=3)", "no setting 'pace', only speed, overhead_ms"),
        ("gpu(speed=0)", "above 0"),
        ("gpu(speed=nan)", "above 0"),
        ("100xgpu(speed=2)", "must be 1 to 64"),
        ("gpu(speed=2", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_wrong_words_for_devices(word: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_device(word)


def test_the_command_compares_policies_and_says_what_is_assumed(tmp_path: Path) -> None:
    file, out = tmp_path / "paths.json", tmp_path / "out.json"
    write_paths(usual_cpu(1.2), file)
    words = [
        f"paths={file}",
        "devices=[cpu,2xgpu(speed=20,overhead_ms=0.3)]",
        "policy=[multi,fixed:table]",
        "rate=500",
        "duration_s=0.5",
        "target_ms=10",
        f"out={out}",
    ]
    said: list[str] = []
    assert simulate_command(from_words(SimulateConfig, words, "simulate"), said.append) == 0
    text = "\n".join(said)
    assert "gpu:1 is assumed, not measured" in text
    assert "cpu is assumed" not in text
    assert max(map(len, text.splitlines()[3:-1])) <= 110
    written = json.loads(out.read_text())
    assert [result["policy"] for result in written["results"]] == ["multi", "fixed:table"]
    assert set(written["assumed"]) == {"gpu:0", "gpu:1"}
    assert written["results"][0]["queries"] == written["results"][1]["queries"] > 100
    assert written["results"][0]["accuracy"] > 0.784


def test_the_command_names_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "paths.json"
    write_paths(usual_cpu(), file)

    def run(*words: str) -> None:
        simulate_command(from_words(SimulateConfig, [f"paths={file}", *words], "simulate"), lambda line: None)

    with pytest.raises(ValueError, match=r"no device 'gpu' in the files, only cpu.*gpu\(speed=20"):
        run("devices=[gpu]")
    with pytest.raises(ValueError, match="no policy 'best'"):
        run("policy=best")
    with pytest.raises(ValueError, match="no path 'x', only table"):
        run("policy=fixed:x", "duration_s=0.1")
    with pytest.raises(ValueError, match="have a device cpu"):
        run("devices=[cpu,cpu]")
    with pytest.raises(ValueError, match="There is no file"):
        simulate_command(SimulateConfig(paths=(tmp_path / "none.json",)), lambda line: None)


def test_a_profile_that_falls_is_read_as_level() -> None:
    path = made_path("only", 1.0, 10, 0.8)
    dented = Profile(rows=(1, 10, 100), latency_ms=(2.0, 1.0, 3.0), tail_ms=(2.0, 1.0, 3.0))
    paths = made_cpu(dataclasses.replace(path, profile=dented), slots=1)
    done = simulate(paths, SchedulerConfig(), [Query(0, 10, 0.0, 0.01)], EXACT)
    assert done.outcomes[0].in_target
