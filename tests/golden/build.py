"""Writes the golden frames and their index: python tests/golden/build.py (see README.md)."""

import json
import shutil
from pathlib import Path
from typing import Any

import bad_cases
import cases as c
import good_cases
import good_row_cases
import independent_decoder as independent

HERE = Path(__file__).resolve().parent


def good() -> list[c.Case]:
    """The good cases; a name that a case stands ``after`` comes before it."""
    return [
        *good_cases.raw_cases(),
        *good_cases.half_cases(),
        *good_cases.packed_cases(),
        *good_cases.uncommon_cases(),
        *good_cases.frame_cases(),
        *good_row_cases.dedup_cases(),
        *good_row_cases.entropy_cases(),
    ]


def check(case: c.Case, frames: dict[str, c.Case]) -> None:
    """Assert that the independent decoder reads the case as it says."""
    books: independent.Books = {}
    for name in case.after:
        independent.decode_frame(frames[name].frame, frames[name].shapes, case.dtype, books)
    fault, values = None, None
    try:
        blocks = independent.decode_frame(case.frame, case.shapes, case.dtype, books)
        values = [x for block in blocks for x in block.reshape(-1).tolist()]
    except independent.Rejected as rejected:
        fault = rejected.fault
    assert fault == case.fault, f"{case.name}: {fault}, not {case.fault}"
    assert values == case.values, case.name


def entry(case: c.Case) -> dict[str, Any]:
    """The case's part of the index."""
    found: dict[str, Any] = {"name": case.name, "dtype": case.dtype, "shapes": case.shapes}
    if case.about:
        found["about"] = case.about
    if case.after:
        found["after"] = case.after
    if case.fault:
        return found | {"fault": case.fault}
    found["values"] = c.runs(case.values or [], case.dtype)
    if case.asked:
        asked = vars(case.asked) | {"input": c.runs(case.asked.input, case.dtype)}
        asked["books"] = ["".join(f"{length:x}" for length in book) for book in case.asked.books]
        found["asked"] = {key: value for key, value in asked.items() if value not in ([], None)}
    return found


def index_text(index: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with a line for each field of a case."""
    folders = []
    for folder, cases in index.items():
        texts = [",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in case.items()) for case in cases]
        folders.append(f'"{folder}": [\n' + ",\n".join(" { " + text + " }" for text in texts) + "\n]")
    return "{\n" + ",\n".join(folders) + "\n}\n"


def hex_lines(frame: bytes) -> str:
    """A frame as text, 24 bytes to a line: the header and each block header have a line of their own."""
    return "".join(frame[at : at + 24].hex() + "\n" for at in range(0, len(frame), 24))


def main() -> None:
    """Check every case and write its file."""
    index = {}
    frames: dict[str, c.Case] = {}
    for folder, cases in (("good", good()), ("bad", bad_cases.bad())):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()
        for case in cases:
            assert case.name not in frames, case.name
            frames[case.name] = case
            check(case, frames)
            (HERE / folder / f"{case.name}.hex").write_text(hex_lines(case.frame))
        index[folder] = [entry(case) for case in cases]
    (HERE / "index.json").write_text(index_text(index))
    print(f"{len(index['good'])} good and {len(index['bad'])} bad frames")


if __name__ == "__main__":
    main()
