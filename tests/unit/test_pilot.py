"""Steps as steering counts them: evaluations leave no trace, a backward has its forward's step."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from tightrec.compression.policy.config import BoundConfig, TableBound
from tightrec.compression.policy.estimates import ModeCost, Trial
from tightrec.sharding import modes as modes_module
from tightrec.sharding import steering as steering_module
from tightrec.sharding.config import CodecConfig
from tightrec.sharding.modes import ModeSteering
from tightrec.sharding.parts import Part, Peers, Slot
from tightrec.sharding.steering import Steering

CPU = torch.device("cpu")
POOLED = KeyedTensor(["a"], [4], torch.zeros(3, 4))
LOSSY = CodecConfig(forward="lossy", backward="lossy", stats_every=4, shadow_every=8)


def _steering(codec: CodecConfig = LOSSY, names: str = "ab") -> Steering:
    slots = tuple(Slot(name=n, feature=n, table=n, dim=4, column=0, mean=False) for n in names)
    peers = Peers(group=None, rank=0, size=2, ranks=(0, 1))
    part = Part(sharding_type="table_wise", kind="spread", sources=(slots, ()), source=0, peers=(peers,))
    tables = [SimpleNamespace(name=n, num_embeddings=10, embedding_dim=4) for n in names]
    return Steering(codec, tables, [part], None, CPU)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the other ranks had measured nothing."""
    for module in (steering_module, modes_module):
        monkeypatch.setattr(module.dist, "all_reduce", lambda tensor, group: None)


def _train(steering: Steering) -> None:
    with torch.enable_grad():
        steering.begin()
    steering.landed(POOLED, {})


def _evaluate(steering: Steering) -> None:
    with torch.no_grad():
        steering.begin()
    steering.landed(POOLED, {})


def _flags(steering: Steering) -> tuple[Any, ...]:
    pilot = steering.pilot
    return pilot.step, pilot.sampled, pilot.shadowed, pilot.what, pilot.measures.active


def test_a_backward_belongs_to_its_forwards_step_counted_or_told() -> None:
    counted, told = _steering(), _steering()
    for step in range(10):
        told.set_step(step)
        for steering in (counted, told):
            _train(steering)
            # What its backward will see:
            expected = (step, step % 4 == 0, step % 8 == 0, f"step {step + 1}", True)
            assert _flags(steering) == expected
    assert counted.state_dict()["step"] == told.state_dict()["step"] == 10
    again = _steering()
    again.load_state_dict(counted.state_dict())
    _train(again)
    assert again.pilot.what == "step 11"


def test_told_steps_need_not_follow_each_other() -> None:
    steering = _steering()
    for step in (7, 7, 3):
        steering.set_step(step)
        _train(steering)
        assert steering.pilot.step == step
    assert steering.state_dict()["step"] == 4


@pytest.mark.parametrize("explicit", [True, False])
def test_evaluations_leave_no_trace(explicit: bool) -> None:
    bound = BoundConfig(
        level="homogenisation", sample_after=0, sample_batches=30, schedule="linear", steps=30
    )
    codec = CodecConfig(
        forward="lossy", backward="lossy", bound=bound, mode="measured", examine_every=20, stats_every=3
    )
    disturbed, quiet = _steering(codec), _steering(codec)
    for step in range(25):
        for steering in (disturbed, quiet):
            if explicit:
                steering.set_step(step)
            _train(steering)
        pilot = disturbed.pilot
        during = (pilot.trial, pilot.sampling_rows, pilot.sizes_wanted, pilot.training)
        assert (pilot.trial is not None) == (step == 20) and pilot.sampling_rows
        for _ in range(3):
            with torch.no_grad():
                disturbed.begin()
            assert pilot.trial is None and not pilot.sampling_rows and not pilot.sampled
            assert not pilot.exact and not pilot.shadowed and not pilot.measures.active
            assert pilot.what == f"an evaluation after step {step + 1}"
            pilot.measures.add("forward", transfers=1, framed=1)
            disturbed.landed(POOLED, {})
        # The backward of the step may still be to come.
        assert (pilot.trial, pilot.sampling_rows, pilot.sizes_wanted, pilot.training) == during
        assert _flags(disturbed) == _flags(quiet)
        assert disturbed.policy.multiplier == quiet.policy.multiplier
    assert disturbed.state_dict() == quiet.state_dict()
    assert disturbed.pilot.measures.take()["forward"].transfers == 0


def test_evaluations_are_never_exact_and_are_not_kept_for_a_probe() -> None:
    steering = _steering(CodecConfig(forward="lossy", budget_ne=1e-3, bound=BoundConfig(probe_every=2)))
    for _ in range(3):
        assert not steering.probe.ready, "only a probe's step is kept"
        _train(steering)
    assert steering.pilot.exact and steering.probe.ready
    steering.probe._kept = None
    _evaluate(steering)
    assert not steering.probe.ready


def _examined(every: int, steps: int, codec: str = "auto") -> Iterator[tuple[int, Steering]]:
    config = CodecConfig(forward=codec, backward=codec, mode="measured", examine_every=every, stats_every=0)  # type: ignore[arg-type]
    steering = _steering(config)
    for step in range(steps):
        steering.set_step(step)
        _train(steering)
        yield step, steering


@pytest.mark.parametrize("codec", ["auto", "lossy"])
@pytest.mark.parametrize("every", [7, 20, 50])
def test_before_every_examination_frames_are_sampled_and_auto_sends_some_plain(
    every: int, codec: str
) -> None:
    due = {step for step in range(1, 130) if step == 20 or step % every == 0}
    tried, sampled, plain, reports = set(), set(), set(), 0
    for step, steering in _examined(every, 130, codec):
        pilot = steering.pilot
        tried |= {step} if pilot.trial is not None else set()
        sampled |= {step} if pilot.sampled else set()
        plain |= {step} if pilot.plain_now else set()
        # The step after an examination decides, so that it was seen whole.
        reports += len(steering.modes.take_reports())
        assert reports == 2 * len([at for at in due if at < step])
        if codec == "auto":
            assert pilot.samples("forward") == (pilot.sampled and not pilot.sends_plain("forward"))
    assert tried == due
    assert sampled >= {step for at in due for step in range(max(0, at - 7), at + 1)}
    assert len(sampled) <= 8 * len(due)
    assert plain >= {at - 3 for at in due if every > 7} and not plain & due


def test_lossless_tables_and_exact_forwards_are_raw_whatever_was_chosen() -> None:
    bound = BoundConfig(tables={"b": TableBound(forward="lossless")})
    steering = _steering(CodecConfig(forward="lossy", backward="lossy", bound=bound, mode="packed"))
    pilot = steering.pilot

    def modes(way: Any) -> tuple[str, ...]:
        return pilot.modes(way, ["a", "b", "a"], ["x", "y", "z"]).modes

    assert (modes("forward"), modes("backward")) == (("packed", "raw", "packed"), ("packed",) * 3)
    assert pilot.modes("forward", ["a"], ["x"]) is pilot.modes("forward", ["a"], ["x"]), "kept over steps"
    pilot.modes_by_table["forward"] = {"a": "entropy", "b": "dedup"}
    pilot.modes_version += 1
    assert modes("forward") == ("entropy", "raw", "entropy")
    pilot.exact = True
    assert (modes("forward"), modes("backward")) == (("raw",) * 3, ("packed",) * 3)
    pilot.exact = False
    assert modes("forward") == ("entropy", "raw", "entropy")


def test_until_something_is_measured_frames_are_the_smallest() -> None:
    for mode in ("auto", "measured", "published"):
        steering = _steering(CodecConfig(forward="lossy", mode=mode))  # type: ignore[arg-type]
        assert steering.pilot.modes("forward", ["a"], ["x"]).modes == ("auto",)


def _trial(best: str) -> Trial:
    costs = {
        mode: ModeCost(
            bytes_per_value=0.2 if mode == best else 1.0,
            encode_s=1e-9,
            decode_s=1e-9,
            encode_call_s=0.0,
            decode_call_s=0.0,
        )
        for mode in ("auto", "raw", "half", "packed", "dedup", "entropy")
    }
    return Trial(values=100, costs=costs)  # type: ignore[arg-type]


def _steer_to(mode: str, names: str, steps: int) -> tuple[Steering, Steering]:
    """One that has examined once, and another that goes on from its state."""
    config = CodecConfig(forward="lossy", mode=mode, examine_every=20)  # type: ignore[arg-type]
    first, second = _steering(config, names), _steering(config, names)
    for step in range(steps):
        first.set_step(step)
        _train(first)
        measures = first.pilot.measures
        measures.add("forward", exchange_s=1e-3 + 1e-6 * step, sent_bytes=400 + step, transfers=1, framed=1)
        if first.pilot.trial is not None:
            _try_all(first.modes, names)
    second.load_state_dict(first.state_dict())
    return first, second


def _try_all(modes: ModeSteering, names: str) -> None:
    modes._trial.run = lambda rows, bound: _trial("dedup" if rows.shape[0] % 2 else "entropy")  # type: ignore[assignment, method-assign]
    for place, name in enumerate(names):
        modes._try("forward", name, torch.ones(place + 1, 4))


def test_published_modes_are_of_all_tables_at_once_and_outlive_a_checkpoint() -> None:
    first, second = _steer_to("published", "abcdefg", steps=22)
    chosen = first.pilot.modes_by_table["forward"]
    assert chosen == {name: ("entropy", "dedup")[name in "aceg"] for name in "abcdefg"}
    tables, slots = list("gfa"), list("xyz")
    for steering in (first, second):
        assert steering.pilot.modes("forward", tables, slots).modes == ("dedup", "entropy", "dedup")


def test_a_step_that_only_checks_errors_tells_nothing_of_what_tables_hold() -> None:
    config = CodecConfig(forward="auto", stats_every=0, shadow_every=1, examine_every=20)
    steering = _steering(config)
    noted: list[Any] = []
    steering.modes._choosers["forward"].record_tables = lambda values, sent: noted.append(values.tolist())  # type: ignore[attr-defined, method-assign, union-attr]
    for step in range(22):
        steering.set_step(step)
        _train(steering)
        if step not in (15, 17):  # plain
            steering.pilot.measures.add("forward", transfers=1, framed=1, exchange_s=1e-3, sent_bytes=10)
            steering.pilot.measures.worst("forward", ["a"], [0.5])
    # A rank that holds no row in a sampled step counts all the same: the mean is over ranks.
    assert noted == [[0.0, 0.0]] * 6
