"""launch/throttled.sh: links as slow as asked, and nothing left behind; and the search for a rate on it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guards
import pytest

SCRIPT = guards.ROOT / "launch" / "throttled.sh"
BENCHMARKS = guards.ROOT / "benchmarks"

# Ranks send MEGABYTES along each of the links "a>b,c>d"; a receiver writes its Mbit/s to FOLDER/RANK, from
# the first byte to the last. After a word RATE the links are changed to it and all is sent once more.
SEND = """
import os, pathlib, socket, subprocess, sys, threading, time
script, folder, size, links, *changes = sys.argv[1:]
rank, size = int(os.environ["RANK"]), int(float(size) * 1e6)
links = [tuple(map(int, link.split(">"))) for link in links.split(",")]
server = socket.create_server(("0.0.0.0", 7000))
# A receiver that the machine lets wait finds little that came before its clock started.
server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
def dial(peer):
    while True:
        try:
            return socket.create_connection((f"10.0.0.{peer + 1}", 7000))
        except OSError:
            time.sleep(0.02)
out = [dial(b) for a, b in links if a == rank]
into = [server.accept()[0] for _, b in links if b == rank]
def receive(stream, times):
    left = size - len(stream.recv(1))
    times.append(time.perf_counter())
    while left:
        left -= len(stream.recv(min(left, 1 << 20)))
    times.append(time.perf_counter())
for change in [None, *changes]:
    if change:
        time.sleep(0.2)
        if rank == 0:
            subprocess.run([script, "--rate", os.environ["THROTTLED_NAME"], change], check=True)
        time.sleep(0.2)
    times = []
    threads = [threading.Thread(target=s.sendall, args=(bytes(size),)) for s in out]
    threads += [threading.Thread(target=receive, args=(s, times)) for s in into]
    [t.start() for t in threads]
    [t.join() for t in threads]
    if into:
        with open(pathlib.Path(folder) / str(rank), "a") as file:
            print(8e-6 * size * len(into) / (max(times) - min(times)), file=file)
time.sleep(0.5)
"""


def _why_not() -> str | None:
    """Why this machine cannot make namespaces and limits."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if os.geteuid() != 0:
        return "needs root"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made.stderr.strip() or None


WHY_NOT = _why_not()
cluster = pytest.mark.skipif(WHY_NOT is not None, reason=f"no rate-limited cluster here: {WHY_NOT}")


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, *map(str, words)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def _heed_signals() -> None:
    """A shell's background job or nohup ignores these, and bash cannot trap what it finds ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    # A shell's background hands down ignored signals, which no script can trap.
    return subprocess.Popen(
        [SCRIPT, *map(str, words)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_signals,
    )


def spaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that within 20 s"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def speeds(folder: Path, ranks: int, rate: str, size: float, links: str, *changes: str) -> dict[int, Any]:
    """Mbit/s that each receiving rank saw, turn by turn."""
    ran = run(ranks, rate, sys.executable, "-c", SEND, SCRIPT, folder, size, links, *changes)
    assert ran.returncode == 0, ran.stderr
    return {int(p.name): [float(x) for x in p.read_text().split()] for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["4", "500mbit"], "give RANKS RATE COMMAND"),
        (["0", "none", "true"], "RANKS is '0'"),
        (["two", "none", "true"], "RANKS is 'two'"),
        (["2", "500", "true"], "RATE is '500'"),
        (["2", "0mbit", "true"], "RATE is '0mbit'"),
        (["2", "fast", "true"], "500mbit, or none"),
        (["2", "none", "no-such-command"], "'no-such-command' was not found"),
        (["--rate", "throttled-1"], "--rate NAME RATE"),
        (["--rate", "throttled-1", "1.5gbit"], "RATE is '1.5gbit'"),
    ],
)
def test_mistakes_are_told_in_words(words: list[str], told: str) -> None:
    ran = run(*words)
    assert ran.returncode == 2
    assert told in ran.stderr


def test_settings_are_checked() -> None:
    assert "LOCAL_WORLD_SIZE=3 does not divide 4" in run(4, "none", "true", LOCAL_WORLD_SIZE="3").stderr
    assert "GRACE_S is 'soon'" in run(4, "none", "true", GRACE_S="soon").stderr


def test_it_asks_for_root() -> None:
    other = {"user": 65534} if os.geteuid() == 0 else {}
    ran: Any = subprocess.run(
        ["bash", "-s", "2", "none", "true"],
        input=SCRIPT.read_text(),
        cwd="/",
        capture_output=True,
        text=True,
        **other,
    )
    assert (ran.returncode, "needs root" in ran.stderr) == (2, True)


def test_it_passes_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "--shell=bash", SCRIPT], check=True)


@cluster
def test_ranks_get_torchruns_variables(tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR GLOO_SOCKET_IFNAME OMP_NUM_THREADS"
    words = " ".join(f"${name}" for name in names.split())
    command = (
        f'echo {words} "$@" > {tmp_path}/$RANK; ip -o address show eth0 | grep -q "10.0.0.$((RANK + 1))/"'
    )
    ran = run(4, "none", "bash", "-c", command, "_", "two words", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="3")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == [
        f"{rank} 4 {rank % 2} 2 10.0.0.1 eth0 3 two words\n" for rank in range(4)
    ]


@cluster
def test_a_link_is_as_slow_as_asked_and_its_rate_can_change(tmp_path: Path) -> None:
    # One way at a time: where both are full, acknowledgements wait behind data and TCP leaves gaps.
    first, changed, unlimited = speeds(tmp_path, 2, "80mbit", 4, "0>1", "240mbit", "none")[1]
    assert first == pytest.approx(80, rel=0.25)
    assert changed == pytest.approx(240, rel=0.25)
    assert unlimited > 320


@cluster
def test_many_to_one_shares_the_receivers_link(tmp_path: Path) -> None:
    assert speeds(tmp_path, 3, "80mbit", 3, "0>2,1>2")[2][0] == pytest.approx(80, rel=0.25)


@cluster
def test_one_to_many_shares_the_senders_link(tmp_path: Path) -> None:
    seen = speeds(tmp_path, 3, "80mbit", 3, "2>0,2>1")
    # The first to finish had at least its half, the last the whole link from then on.
    assert 40 * 0.75 < min(seen[0] + seen[1]) < 40 * 1.25


@cluster
def test_two_clusters_stand_beside_each_other_and_leave_nothing() -> None:
    both = [start(2, "100mbit", "sleep", "0.5") for _ in range(2)]
    until(lambda: all(f"throttled-{p.pid}-r1" in spaces() for p in both))
    assert [p.wait(20) for p in both] == [0, 0]
    assert not any(f"throttled-{p.pid}-" in spaces() for p in both)


@cluster
def test_a_failing_rank_ends_the_others_and_gives_its_status(tmp_path: Path) -> None:
    # Rank 0 asks no longer than GRACE_S to go; its child has left its process group.
    command = f"""echo $$ > {tmp_path}/$RANK
if [ $RANK = 1 ]; then sleep 0.3; exit 7; fi
trap '' TERM
setsid sleep 61 &>/dev/null & echo $! > {tmp_path}/child
sleep 60; sleep 60"""
    process = start(2, "none", "bash", "-c", command, GRACE_S="1")
    begin = time.monotonic()
    assert process.wait(20) == 7
    assert time.monotonic() - begin > 1
    assert process.stderr and process.stderr.read().splitlines() == [
        "launch/throttled.sh: rank 1 ended with status 7; the others are ended."
    ]
    assert f"throttled-{process.pid}-" not in spaces()
    pids = [int((tmp_path / name).read_text()) for name in ("0", "1", "child")]
    assert [pid for pid in pids if alive(pid)] == []


@cluster
def test_ranks_that_fail_together_are_all_seen() -> None:
    assert run(8, "none", "bash", "-c", "sleep 0.3; exit 3").returncode == 3


@cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(number: signal.Signals, tmp_path: Path) -> None:
    process = start(2, "none", "bash", "-c", f"echo $$ > {tmp_path}/$RANK; sleep 60")
    until(lambda: all((tmp_path / rank).is_file() and (tmp_path / rank).read_text() for rank in "01"))
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert f"throttled-{process.pid}-" not in spaces()
    assert not any(alive(int((tmp_path / rank).read_text())) for rank in "01")


@cluster
def test_ranks_may_end_well_on_a_signal_and_a_second_one_does_not_wait(tmp_path: Path) -> None:
    wait = f"echo > {tmp_path}/$RANK; while true; do sleep 0.1; done"
    for handler, signals, status in (("exit 0", 1, 0), (":", 2, 137)):
        process = start(2, "none", "bash", "-c", f"trap '{handler}' TERM; {wait}")
        until(lambda: all((tmp_path / rank).is_file() for rank in "01"))
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert process.wait(20) == status
        assert f"throttled-{process.pid}-" not in spaces()
        for rank in "01":
            (tmp_path / rank).unlink()


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step_speed_rate

    return step_speed_rate


def test_words_for_rates(rates: Any) -> None:
    words = rates.rate_words("share, share*2,share/2,500mbit,none")
    assert [rates.resolved(w, 120_000) for w in words] == [
        "120000kbit",
        "240000kbit",
        "60000kbit",
        "500mbit",
        "none",
    ]
    for wrong in ("", "fast", "share*", "share/0", "2*share", "500"):
        with pytest.raises(ValueError, match="is not a rate"):
            rates.rate_words(f"none,{wrong}")


def test_the_search_finds_the_rate_of_a_share(rates: Any) -> None:
    def measure(kbit: int) -> Any:
        # 2.6 MB to send, 5 ms that no rate shortens, and a rest that has bytes of its own.
        exchange = 8 * 2.6e6 / kbit + 5
        return rates.Sample(exchange, exchange + 50 + 8 * 0.3e6 / kbit)

    begin = rates.first_guess(50, 2.6e6, 0.626)
    assert measure(begin).share == pytest.approx(0.626, abs=0.06)
    for start_at in (begin, 100 * begin, begin // 100):
        kbit, tried = rates.solve(measure, start_at, 0.626, 0.002, 20)
        assert measure(kbit).share == pytest.approx(0.626, abs=0.002)
        assert tried[-1][0] == kbit
    # A noisy machine: the second of three measurements is the nearest.
    noisy = iter([rates.Sample(50, 100), rates.Sample(62, 100), rates.Sample(70, 100)])
    kbit, tried = rates.solve(lambda _: next(noisy), 5000, 0.626, 0.0, 3)
    assert (len(tried), kbit) == (3, tried[1][0])


@cluster
def test_the_benchmark_measures_refuses_and_prints(tmp_path: Path) -> None:
    words = "--quick --rounds 1 --steps 2 --warm 1 --ranks 2 --batch 32 --dim 8 --cardinality 1000"
    words += " --rates 300mbit --only fp16,fp8"
    ran = subprocess.run(
        [sys.executable, BENCHMARKS / "step_speed.py", *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    settings, plain, half, refused = rows
    assert settings["ranks"] == 2 and "model.embedding_dim=8" in settings["common"]
    assert [row["variant"] for row in rows[1:]] == ["plain", "fp16", "fp8"]
    assert "no fp8 quantiser on CPU" in refused["refused"]
    assert "fp8       refused: " in ran.stdout
    assert plain["sent_bytes"]["forward"] == 2 * 26 / 2 * 32 * 8 * 4
    assert half["sent_bytes"]["forward"] == plain["sent_bytes"]["forward"] / 2
    assert half["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert plain["speedup"] == 1 and 0 < half["speedup_min"] <= half["speedup"] <= half["speedup_max"]
    assert plain["rate"] == "300mbit" and 0 < plain["exchange_share"] < 1
