"""``python -m tightrec.compression``: what it prints, proves and refuses, and with which exit status."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tightrec.compression import commands
from tightrec.compression.__main__ import main
from tightrec.compression.codebooks import Codebooks
from tightrec.compression.codec import encode
from tightrec.compression.frames import checksummed
from tightrec.compression.layout import Layout
from tightrec.compression.store import load, save

Capture = pytest.CaptureFixture[str]


def write_rows(folder: Path, name: str = "users.npy") -> tuple[Path, np.ndarray]:
    """A float32 matrix [500, 16] in which rows repeat, with a NaN, as a .npy file."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((40, 16)).astype(np.float32)[generator.integers(0, 40, 500)]
    rows[7, 3] = np.nan
    np.save(folder / name, rows)
    return folder / name, rows


def run(capture: Capture, *words: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command in this process."""
    status = main([str(word) for word in words])
    printed = capture.readouterr()
    return status, printed.out, printed.err


def refused(capture: Capture, *words: object, status: int = 1) -> str:
    """The one sentence of a command that must fail."""
    found, out, told = run(capture, *words)
    assert found == status
    assert told.count("\n") == 1 and "error: " in told, told
    assert "total" not in out
    return told


def columns(line: str) -> list[str]:
    """Cells of an aligned line."""
    return re.split(r"  +", line)


def test_compress_inspect_and_verify_in_processes_of_their_own(tmp_path: Path) -> None:
    source, _ = write_rows(tmp_path)
    base = [sys.executable, "-m", "tightrec.compression"]
    done = subprocess.run([*base, "compress", source, "--bound", "0.01"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [*base, "verify", "users.trec", "--original", source], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "proved: every value is within its bound" in done.stdout
    done = subprocess.run([*base, "inspect", source], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_matrix_is_compressed_with_every_kind_of_bound(tmp_path: Path, capsys: Capture) -> None:
    source, rows = write_rows(tmp_path)
    finite = rows[np.isfinite(rows)].astype(np.float64)
    expected = {
        "--bound": 0.02,
        "--range": 0.02 * (finite.max() - finite.min()),
        "--rms": 0.02 * math.sqrt((finite**2).mean()),
    }
    for word, bound in expected.items():
        status, out, told = run(capsys, "compress", source, word, 0.02, "--force")
        assert (status, told) == (0, "")
        head, line, total = out.splitlines()
        assert columns(head)[:4] == ["tensor", "shape", "type", "mode"]
        assert columns(line)[:4] == ["users", "500 x 16", "float32", "dedup"]
        assert math.isclose(float(columns(line)[4]), bound, rel_tol=1e-4)
        again = load(tmp_path / "users.trec")["users"].numpy()
        assert again.shape == rows.shape
        assert np.array_equal(np.isnan(again), np.isnan(rows))
        assert (np.abs(again - rows.astype(np.float64))[np.isfinite(rows)] <= bound * (1 + 1e-6)).all()
        assert total.startswith(f"total: {rows.nbytes} bytes of values, ")


def test_lossless_and_the_settings_of_one_tensor(tmp_path: Path, capsys: Capture) -> None:
    source, rows = write_rows(tmp_path)
    out = tmp_path / "other.trec"
    assert run(capsys, "compress", source, "--mode", "raw", "--out", out)[0] == 0
    assert np.array_equal(load(out)["users"].numpy().view(np.int32), rows.view(np.int32))
    for spec, mode, bound in (
        ("0.25,packed", "packed", 0.25),
        ("bound:0.5,dedup", "dedup", 0.5),
        ("raw", "raw", 0),
    ):
        assert run(capsys, "compress", source, "--out", out, "--force", "--table", f"users={spec}")[0] == 0
        status, text, _ = run(capsys, "inspect", out, "--json")
        (frame,) = json.loads(text)["frames"]
        (block,) = frame["blocks"]
        assert (status, block["mode"], block["bound"]) == (0, mode, bound)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--bound", "-1"], "'--bound': the error bound is -1.0; it must be a normal float32"),
        (["--bound", "nan"], "the error bound is nan"),
        ([], "no error bound for 'users': give --bound, --range or --rms"),
        (["--bound", "0.1", "--mode", "raw"], "was given, but no tensor uses it"),
        (["--table", "users=0.1,raw"], "gives 'users' a bound, but mode raw is lossless"),
        (["--table", "users"], "write NAME=0.01"),
        (["--table", "users=x"], "'x' is neither a number nor one of auto, raw"),
        (["--table", "users=max:1"], "'max' is not bound, range or rms"),
        (["--table", "users=rms:0"], "the error bound is 0.0"),
        (["--table", "items=0.1"], "--table names 'items', but"),
    ],
)
def test_mistakes_in_the_words_end_with_2(
    tmp_path: Path, capsys: Capture, words: list[str], sentence: str
) -> None:
    source, _ = write_rows(tmp_path)
    assert sentence in refused(capsys, "compress", source, *words, status=2)
    assert os.listdir(tmp_path) == ["users.npy"]


def test_usage_and_help(capsys: Capture) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert out.startswith("usage: python -m tightrec.compression")
    assert run(capsys, "compress", "--help")[0] == 0
    for words in (["pack"], ["inspect"], ["compress", "x", "--bound", "a"], ["inspect", "x", "--frobnicate"]):
        status, _, told = run(capsys, *words)
        assert status == 2
        assert told.startswith("usage: ")
    status, _, told = run(capsys, "compress", "x.npy", "--bound", "1", "--rms", "1")
    assert status == 2 and "not allowed with" in told


def test_files_that_cannot_be_read_or_written_end_with_1(tmp_path: Path, capsys: Capture) -> None:
    source, _ = write_rows(tmp_path)
    (tmp_path / "folder.trec").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "broken.npy").write_bytes(source.read_bytes()[:200])
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    before = sorted(os.listdir(tmp_path))
    for command in ("inspect", "verify", "compress"):
        words = ["--bound", "1"] if command == "compress" else []
        assert "No such file or directory" in refused(capsys, command, tmp_path / "absent.npy", *words)
        assert "Is a directory" in refused(capsys, command, tmp_path, *words)
        assert "neither a " in refused(capsys, command, tmp_path / "text.txt", *words)
        assert "not a regular file" in refused(capsys, command, os.devnull, *words)

    def compress(*words: object) -> str:
        return refused(capsys, "compress", *words, "--bound", "1")

    assert "not a readable .npy file" in compress(tmp_path / "broken.npy")
    assert "not a readable .npy file" in compress(tmp_path / "objects.npy")
    assert "safetensors" in compress(tmp_path / "broken.safetensors")
    assert "not a regular file" in compress(source, "--out", tmp_path / "folder.trec", "--force")
    assert "the original itself" in compress(source, "--out", source, "--force")
    assert "no such folder" in compress(source, "--out", tmp_path / "nowhere" / "a.trec")
    assert sorted(os.listdir(tmp_path)) == before


def test_an_existing_output_is_kept_without_force(tmp_path: Path, capsys: Capture) -> None:
    source, _ = write_rows(tmp_path)
    (tmp_path / "users.trec").write_text("precious")
    assert "exists; --force replaces it" in refused(capsys, "compress", source, "--bound", "1")
    assert (tmp_path / "users.trec").read_text() == "precious"
    assert run(capsys, "compress", source, "--bound", "1", "--force")[0] == 0
    assert run(capsys, "verify", tmp_path / "users.trec")[0] == 0


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (PermissionError(13, "Permission denied"), 1, "Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_full_disk_and_ctrl_c_leave_nothing_behind(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    sentence: str,
) -> None:
    source, _ = write_rows(tmp_path)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fails)
    found, out, told = run(capsys, "compress", source, "--bound", "1")
    assert (found, out) == (status, "")
    assert sentence in told and told.count("\n") == 1
    assert status == 130 or str(tmp_path / "users.trec") in told
    assert os.listdir(tmp_path) == ["users.npy"]


def test_a_matrix_of_doubles_is_refused_by_name(tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "d.npy", np.zeros(4))
    told = refused(capsys, "compress", tmp_path / "d.npy", "--bound", "1")
    assert "not 'd' (float64); convert them, or leave them out with --skip" in told
    told = refused(capsys, "compress", tmp_path / "d.npy", "--bound", "1", "--skip")
    assert "no tensor in it that could be compressed" in told
    for name, array in {
        "fortran": np.asfortranarray(np.eye(3, 4, dtype="f4")),
        "big": np.eye(3, 4, dtype=">f4"),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert run(capsys, "compress", tmp_path / f"{name}.npy", "--mode", "raw")[0] == 0
        assert np.array_equal(load(tmp_path / f"{name}.trec")[name].numpy(), np.eye(3, 4, dtype="f4"))


def test_without_the_safetensors_library_a_sentence_says_so(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "m.safetensors").write_bytes(bytes(8))
    told = refused(capsys, "compress", tmp_path / "m.safetensors", "--bound", "1")
    assert "needs the safetensors library: pip install safetensors" in told


def test_safetensors_with_other_types_are_refused_or_left_out(tmp_path: Path, capsys: Capture) -> None:
    torch_files = pytest.importorskip("safetensors.torch", reason="the safetensors library is not installed")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(50, 8, generator=generator),
        "b.c": torch.randn(50, 8, generator=generator).half(),
        "d": torch.randn(33, generator=generator).bfloat16(),
    }
    source = tmp_path / "m.safetensors"
    torch_files.save_file({**tensors, "step": torch.tensor(3), "wide": torch.zeros(2).double()}, source)
    told = refused(capsys, "compress", source, "--bound", "0.1")
    assert "not 'step' (I64), 'wide' (F64)" in told
    status, out, _ = run(capsys, "compress", source, "--bound", "0.1", "--skip", "--table", "b.c=rms:0.2")
    assert status == 0
    assert "left out: step (I64)" in out and "left out: wide (F64)" in out
    again = load(tmp_path / "m.trec")
    assert {name: (v.dtype, v.shape) for name, v in again.items()} == {
        name: (v.dtype, v.shape) for name, v in tensors.items()
    }
    status, out, told = run(capsys, "verify", tmp_path / "m.trec", "--original", source)
    assert (status, told) == (0, "")
    assert "not compared, as they are not stored: step, wide" in out


def frame_bytes(checksum: bool = True, book: bool = False) -> bytes:
    """A bare frame with three blocks, the last one empty; with ``book`` the first uses one that was kept."""
    layout = Layout.flat([[600, 30, 0]], [16, 4, 3])
    values = torch.randn(600 * 16 + 120, generator=torch.Generator().manual_seed(5))
    books = Codebooks(1, 3)
    encode(values, layout, 0.01, "entropy", codebooks=books)
    books.refresh()
    if book:
        books.sent.copy_(books.ids)
    modes = ("entropy", "raw", "packed")
    frame = encode(values, layout, 0.01, modes, codebooks=books).frame(0).numpy().tobytes()  # type: ignore[arg-type]
    return checksummed(frame) if checksum else frame


def test_inspect_prints_the_headers_of_a_bare_frame(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "frame"
    path.write_bytes(frame_bytes())
    status, out, _ = run(capsys, "inspect", path)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"frame of version 1, float32, blocks: 3, {path.stat().st_size} bytes"
    assert [line.split()[5] for line in lines[2:5]] == ["entropy", "raw", "raw"]
    assert lines[3].split()[6] == "lossless"
    assert lines[-1] == "checksum: matches"
    status, out, _ = run(capsys, "verify", path)
    assert (status, "every block decodes to its shape (blocks: 3)" in out) == (0, True)
    assert "not proved: that values are within their bounds of the original" in out
    assert "works with stored files" in refused(capsys, "verify", path, "--original", path, status=2)
    path.write_bytes(frame_bytes(checksum=False))
    assert run(capsys, "inspect", path)[1].endswith("has none, so damage to its values may go unseen\n")
    path.write_bytes(frame_bytes(book=True))
    assert "1 (kept)" in run(capsys, "inspect", path)[1]
    assert "uses a codebook that has not been received" in refused(capsys, "verify", path)


def test_inspect_and_verify_refuse_damage(tmp_path: Path, capsys: Capture) -> None:
    source, _ = write_rows(tmp_path)
    assert run(capsys, "compress", source, "--bound", "0.01")[0] == 0
    for path, data in (
        (tmp_path / "users.trec", (tmp_path / "users.trec").read_bytes()),
        (tmp_path / "frame", frame_bytes()),
    ):
        for command in ("inspect", "verify"):
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
            assert "its checksum does not match its bytes" in refused(capsys, command, path)
            path.write_bytes(data[:-16])
            assert "cut short" in (told := refused(capsys, command, path)) or "size field" in told
    # The headers are in order and nothing guards the payload: only decoding sees it.
    frame = bytearray(frame_bytes(checksum=False))
    start = 24 + 3 * 24 + 128
    frame[start + 4 : start + 8] = b"\xff" * 4
    (tmp_path / "frame").write_bytes(frame)
    assert run(capsys, "inspect", tmp_path / "frame")[0] == 0
    assert "block 0: bad frame: " in refused(capsys, "verify", tmp_path / "frame")


def test_json_says_the_same_as_the_table(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path / "a.trec", {"x": torch.ones(100, 8), "none": torch.zeros(0)}, 0.01)
    status, text, _ = run(capsys, "inspect", tmp_path / "a.trec", "--json")
    found = json.loads(text)
    assert (status, found["kind"]) == (0, "stored file")
    assert found["file_bytes"] == (tmp_path / "a.trec").stat().st_size
    one, none = found["frames"]
    assert one["tensor"]["shape"] == [100, 8] and one["checksum"] == "matches"
    (block,) = one["blocks"]
    assert (block["mode"], block["distinct"], block["rows"], block["dim"]) == ("dedup", 1, 100, 8)
    assert block["ratio"] == 3200 / block["payload_bytes"]
    assert none["blocks"][0]["ratio"] is None


def test_verify_names_the_element_that_breaks_its_bound(tmp_path: Path, capsys: Capture) -> None:
    source, rows = write_rows(tmp_path)
    assert run(capsys, "compress", source, "--bound", "0.01")[0] == 0
    stored = tmp_path / "users.trec"
    status, out, _ = run(capsys, "verify", stored, "--original", source)
    line = out.splitlines()[1].split()
    assert (status, line[:3]) == (0, ["users", "8000", "0.01"])
    assert 0.9 < float(line[4]) <= 1
    for value in (rows[123, 5] + np.float32(0.03), np.nan, np.inf):
        changed = rows.copy()
        changed[123, 5] = value
        np.save(tmp_path / "changed.npy", changed)
        told = refused(capsys, "verify", stored, "--original", tmp_path / "changed.npy")
        assert "tensor 'users' element [123, 5] is" in told and "; 1 of 8000 values are" in told
    changed = rows.copy()
    changed.view(np.int32)[7, 3] ^= 1
    np.save(tmp_path / "changed.npy", changed)
    assert "element [7, 3] is nan" in refused(
        capsys, "verify", stored, "--original", tmp_path / "changed.npy"
    )
    for other, sentence in ((rows.T, "(16, 500) in the original"), (rows.astype("f2"), "torch.float16 (500")):
        np.save(tmp_path / "changed.npy", other)
        assert sentence in refused(capsys, "verify", stored, "--original", tmp_path / "changed.npy")
    save(stored, {"users": torch.zeros(2), "more": torch.zeros(2)}, 1.0)
    assert "does not hold 'more'" in refused(capsys, "verify", stored, "--original", source)


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path / "a.trec", {"\x1b[2Jx": torch.ones(3), "": torch.ones(3)}, 0.1)
    for command in ("inspect", "verify"):
        status, out, _ = run(capsys, command, tmp_path / "a.trec")
        assert status == 0 and "\x1b" not in out
    (tmp_path / "\x1b.trec").write_bytes((tmp_path / "a.trec").read_bytes()[:-16])
    assert "'\\x1b[2Jx'" in commands._shown("\x1b[2Jx")
