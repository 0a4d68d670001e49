"""The command line of prepare: help, exit codes, and runs that are killed, interrupted or out of disk."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tightrec.formats.schema import load_schema
from tightrec.trainer.data.prepare import __main__ as prepare

RUN = [sys.executable, "-m", "tightrec.trainer.data.prepare"]
DAWDLING = """
import sys, time
from tightrec.trainer.data.prepare import __main__, criteo
criteo.SPILL_PIECES = 4
{where} = (lambda real: lambda *a, **k: (time.sleep(0.2), real(*a, **k))[1])({where})
sys.exit(__main__.main(sys.argv[1:]))
"""
"""A run slow enough to be stopped at a chosen place."""


def click_log(path: Path, rows: int = 600) -> Path:
    lines = []
    for row in range(rows):
        ids = [f"{(row * 37 + column) % (column + 3) * 0x9E3779B1 % 2**32:08x}" for column in range(26)]
        lines.append("\t".join([str(row % 2), *(str(row * k % 50) for k in range(13)), *ids]) + "\n")
    path.write_text("".join(lines))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *words], capture_output=True, text=True, timeout=120, **options)


def stopped(where: str, words: list[str], when: Callable[[], bool], sign: signal.Signals) -> tuple[int, str]:
    """Exit code and words of a run that gets ``sign`` when ``when`` comes true."""
    child = subprocess.Popen(
        [sys.executable, "-c", DAWDLING.format(where=where), *words],
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell have SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 100
    while not when():
        assert child.poll() is None, f"the run ended before it could be stopped: {child.communicate()[1]}"
        assert time.monotonic() < deadline, "the run did not come to the place where it is stopped"
        time.sleep(0.01)
    child.send_signal(sign)
    return child.wait(60), child.communicate()[1]


def journal_lines(stage: Path) -> int:
    path = stage / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_in_either_pass_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source, out, partial = click_log(tmp_path / "day_0"), tmp_path / "out", tmp_path / "out.partial"
    words = ["criteo", f"src={source}", f"dst={out}", "part_bytes=4096"]
    whole = run(["criteo", f"src={source}", f"dst={tmp_path / 'whole'}", "part_bytes=4096"])
    assert whole.returncode == 0, whole.stderr

    counting = "criteo._Preparation.count_piece"
    code, _ = stopped(counting, words, lambda: journal_lines(partial / "count") >= 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not out.exists()
    assert 2 <= journal_lines(partial / "count") < 10

    code, told = stopped(
        "criteo.write_part", words, lambda: journal_lines(partial / "write") >= 3, signal.SIGKILL
    )
    assert "1 of 2, counting ids: continuing behind" in told
    assert code == -signal.SIGKILL
    assert not out.exists()
    # A kill in the middle of an append leaves a torn line, one in the middle of a part half a file.
    with (partial / "write" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"done": 99')
    following = f"part-{journal_lines(partial / 'write') + 1:05d}.parquet"
    for half in (following, following + ".partial"):
        (partial / "write" / "out" / "train" / half).write_bytes(b"PAR1")

    ended = run([*words, "threads=1"])
    assert ended.returncode == 0, ended.stderr
    assert "2 of 2, writing: continuing behind" in ended.stderr
    assert tree(out) == tree(tmp_path / "whole")
    assert not partial.exists()


def test_interrupting_says_how_to_continue_and_exits_130(tmp_path: Path) -> None:
    source, out = click_log(tmp_path / "day_0"), tmp_path / "out"
    words = ["criteo", f"src={source}", f"dst={out}", "part_bytes=4096", "ids=hash"]
    write = tmp_path / "out.partial" / "write"
    code, told = stopped("criteo.write_part", words, lambda: journal_lines(write) >= 2, signal.SIGINT)
    assert code == 130
    assert told.splitlines()[-1].startswith("Interrupted. Give the same command again to continue")
    assert "Traceback" not in told
    assert run(words).returncode == 0
    assert sum(load_schema(out).rows.values()) == 600


def test_two_runs_do_not_work_on_one_destination(tmp_path: Path) -> None:
    words = ["criteo", f"src={click_log(tmp_path / 'day_0')}", f"dst={tmp_path / 'out'}", "part_bytes=4096"]
    child = subprocess.Popen([sys.executable, "-c", DAWDLING.format(where="criteo.write_part"), *words])
    try:
        deadline = time.monotonic() + 100
        while not journal_lines(tmp_path / "out.partial" / "write"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = run(words)
    finally:
        child.kill()
        child.wait()
    assert second.returncode == 1
    assert "in use by another preparation" in second.stderr


def test_a_full_disk_is_told_in_words_and_the_run_can_go_on(tmp_path: Path) -> None:
    source = click_log(tmp_path / "day_0")
    words = ["criteo", f"src={source}", f"dst={tmp_path / 'out'}", "ids=hash"]
    # Files limited in size fail to be written as on a full disk, with an error of the system.
    limited = run(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)))
    assert limited.returncode == 1
    assert "give the same command again" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert not (tmp_path / "out").exists()
    assert run(words).returncode == 0


@pytest.mark.parametrize("words", [[], ["--help"], ["criteo"], ["movielens", "--help"], ["jester"]])
def test_help_lists_every_setting_with_default_and_meaning(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(words) == 0
    text = capsys.readouterr().out
    names = [words[0]] if words and words[0] in prepare.DATA_SETS else list(prepare.DATA_SETS)
    for name in names:
        for key in prepare.DATA_SETS[name][0].__dataclass_fields__:
            assert f"\n  {key}=" in text
    assert max(map(len, text.splitlines())) <= 110
    if "criteo" in names:
        assert "errors=strict|tolerant  (tolerant)\n      strict: stop at the first bad line" in text
        assert "memory_gb=FLOAT  (2.0)" in text
        assert "max_ids=INT  (none)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["avazu", "src=a"], "There is no data set 'avazu'. Known: criteo, movielens, jester."),
        (["criteo", "src=a", "dst=b", "min_cuont=3"], "Did you mean 'min_count'?"),
        (["criteo", "src=a"], "dst: this setting has no default"),
        (["jester", "src"], "'src' is not of the form key=value"),
    ],
)
def test_misuse_is_one_sentence_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_bad_input_is_one_sentence_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "day_0").write_text("not a click log\n")
    assert prepare.main(["criteo", f"src={tmp_path}", f"dst={tmp_path / 'out'}", "errors=strict"]) == 1
    assert "day_0, line 1: 1 columns where 40 belong" in capsys.readouterr().err
    assert prepare.main(["criteo", f"src={tmp_path}/gone", f"dst={tmp_path / 'out'}"]) == 1
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
def test_what_may_not_be_read_or_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = click_log(tmp_path / "day_0")
    source.chmod(0)
    assert prepare.main(["criteo", f"src={source}", f"dst={tmp_path / 'out'}"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    source.chmod(0o600)
    (tmp_path / "closed").mkdir(mode=0o500)
    assert prepare.main(["criteo", f"src={source}", f"dst={tmp_path / 'closed' / 'out'}"]) == 1
    assert "cannot be made" in capsys.readouterr().err
