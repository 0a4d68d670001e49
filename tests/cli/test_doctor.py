"""The doctor: a whole run on this machine, and what it says of each way in which a stack can be broken."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tightrec.trainer import doctor, doctor_probes
from tightrec.trainer.versions import NEEDED, STACKS, Environment

HEALTHY = dict.fromkeys(NEEDED, "1.0") | {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "torchmetrics": "1.0.3",
    "fbgemm-gpu-cpu": "1.8.0",
}


@pytest.fixture(scope="module")
def whole_run() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tightrec.trainer.doctor", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_the_doctor_passes_here_and_says_so_in_json(whole_run: subprocess.CompletedProcess[str]) -> None:
    answer = json.loads(whole_run.stdout)
    status = {check["name"]: (check["status"], check["found"]) for check in answer["checks"]}
    assert {name: s for name, s in status.items() if s[0] == "fail"} == {}
    assert (whole_run.returncode, answer["ok"]) == (0, True)
    assert status["torch"][1] == torch.__version__
    assert "0.0e+00" in status["lookup"][1] or "e-" in status["lookup"][1]
    assert status["all_to_all"][1] == "2 gloo processes exchanged uneven counts"
    assert {"python", "torchrec", "fbgemm", "operators", "GPU", "CuPy", "nvcc"} <= set(status)
    assert [row["torch"] for row in answer["stacks"]] == [stack.torch for stack in STACKS]
    assert [row["here"] for row in answer["stacks"]].count(True) == 1


@pytest.fixture
def fake_fbgemm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a package ``fbgemm_gpu`` with the given source before the real one, for the probes' processes."""

    def put(source: str) -> None:
        (tmp_path / "fbgemm_gpu").mkdir()
        (tmp_path / "fbgemm_gpu" / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "raise OSError('/x/fbgemm.so: undefined symbol: _ZN3c10aEv')",
            "undefined symbol _ZN3c10aEv: a library was",
        ),
        (
            "raise OSError('libcuda.so.1: cannot open shared object file: No')",
            "the library libcuda.so.1 is missing",
        ),
        ("import no_such_module_here", "the module no_such_module_here is not installed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process crashed with SIGSEGV"),
        ("raise RuntimeError('odd')", "exit code 1: RuntimeError: odd"),
        ("import sys; sys.exit()", "exit code 0: no message"),
    ],
)
def test_a_broken_fbgemm_is_told_in_words(
    source: str, words: str, fake_fbgemm: Callable[[str], None]
) -> None:
    fake_fbgemm(source)
    check = doctor.run_probe("operators", timeout_s=60)
    assert check.status == "fail"
    assert words in check.found


@pytest.mark.timeout(40)
def test_a_hang_is_ended_with_all_its_processes(tmp_path: Path, fake_fbgemm: Callable[[str], None]) -> None:
    pid_file = tmp_path / "pid"
    child = f"subprocess.Popen(['sleep', '80']); open({str(pid_file)!r}, 'w').write(str(child.pid))"
    fake_fbgemm(f"import subprocess, time\nchild = {child}\ntime.sleep(80)")
    check = doctor.run_probe("operators", timeout_s=3)
    assert (check.status, check.found) == ("fail", "no answer within 3 s; it was ended")
    with pytest.raises(ProcessLookupError):
        _signal_unless_zombie(int(pid_file.read_text()))


def _signal_unless_zombie(pid: int) -> None:
    """Raise ProcessLookupError unless the process runs; an orphan may wait to be reaped."""
    os.kill(pid, 0)
    if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
        raise ProcessLookupError


def stubbed(monkeypatch: pytest.MonkeyPatch, **failing: str) -> None:
    """Replace the probes: those named fail with the given words, the others pass."""

    def run(name: str, timeout_s: float) -> doctor.Check:
        status: doctor.Status = "fail" if name in failing else "ok"
        return doctor.Check(name=name, status=status, found=failing.get(name, "fine"))

    monkeypatch.setattr(doctor, "run_probe", run)


def diagnosed(packages: dict[str, str], *, driver: bool = False) -> dict[str, doctor.Check]:
    environment = Environment(packages=packages, python=(3, 11), driver=driver)
    return {check.name: check for check in doctor.diagnose(environment)}


def test_a_failed_probe_fails_the_doctor_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubbed(monkeypatch, all_to_all="no route")
    assert doctor.main([]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "no route" in printed
    assert "GLOO_SOCKET_IFNAME" in printed
    assert "a check failed" in printed
    stubbed(monkeypatch)
    assert doctor.main([]) == 0
    assert "Everything that training needs is in order." in capsys.readouterr().out


def test_clashing_packages_fail_the_doctor_with_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubbed(monkeypatch)
    broken = Environment(packages=HEALTHY | {"fbgemm-gpu": "1.8.0"}, python=(3, 11), driver=False)
    monkeypatch.setattr(doctor, "installed", lambda: broken)
    assert doctor.main([]) == 1
    assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu" in capsys.readouterr().out
    assert doctor.main(["--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in answer["checks"] if check["status"] == "fail"] == ["fbgemm"]


def test_missing_packages_fail_the_line_that_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch)
    checks = diagnosed(
        {name: version for name, version in HEALTHY.items() if name not in ("rich", "torchrec")}
    )
    failed = {name: check.advice for name, check in checks.items() if check.status == "fail"}
    assert failed == {"torchrec": "torchrec is not installed.", "other packages": "rich is not installed."}


CUDA = {name: v for name, v in HEALTHY.items() if name != "fbgemm-gpu-cpu"} | {
    "torch": "2.13.0+cu130",
    "fbgemm-gpu": "1.8.0",
    "cupy-cuda13x": "14.2.0",
}


@pytest.mark.parametrize(
    ("packages", "failing", "gpu", "cupy"),
    [
        (CUDA, {}, "ok", "ok"),
        (CUDA, {"cuda": "finds no usable GPU"}, "fail", "ok"),
        (CUDA, {"cupy": "the library libnvrtc.so.13 is missing"}, "ok", "fail"),
        ({name: v for name, v in CUDA.items() if name != "cupy-cuda13x"}, {}, "ok", "warn"),
        (HEALTHY, {"cuda": "a build without CUDA"}, "warn", "warn"),
    ],
)
def test_a_machine_with_a_driver(
    packages: dict[str, str], failing: dict[str, str], gpu: str, cupy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubbed(monkeypatch, **failing)
    checks = diagnosed(packages, driver=True)
    assert (checks["GPU"].status, checks["CuPy"].status) == (gpu, cupy)
    assert doctor.exit_code(list(checks.values())) == int("fail" in (gpu, cupy))
    assert all(check.advice for check in (checks["GPU"], checks["CuPy"]) if check.status != "ok")


def test_the_tables_are_printed_without_rich_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubbed(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    environment = Environment(packages=HEALTHY, python=(3, 11), driver=False)
    doctor.print_tables(doctor.diagnose(environment), environment)
    printed = capsys.readouterr().out
    assert "torchrec | ok | 1.8.0" in printed
    assert "2.13.* | 1.8.0 | 1.8.0 | this torch" in printed


def test_the_lookup_probe_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_probes.lookup().ok
    right = torch.nn.functional.embedding_bag

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return right(*arguments, **options) * 1.01

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", wrong)
    assert not doctor_probes.lookup().ok


@pytest.mark.parametrize(
    ("shares", "ok"), [(["[0, 10, 10]", "[1, 1, 11, 11, 11]"], True), (["[0]", "[1]"], False)]
)
def test_the_exchange_probe_compares_what_arrived(
    shares: list[str], ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(worker: object, args: tuple[str], nprocs: int) -> None:
        folder = Path(args[0].removeprefix("file://")).parent
        for rank in range(nprocs):
            (folder / f"rank{rank}").write_text(shares[rank])

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    assert doctor_probes.all_to_all().ok is ok
