"""``prepare movielens`` and ``prepare jester``: every rating becomes the row that the rules say."""

import io
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from criteo_files import read_split, tree, words
from rich.console import Console

from tightrec.formats.schema import SPLITS, Schema
from tightrec.formats.settings import from_words
from tightrec.trainer.data.prepare import in_memory, jester, movielens
from tightrec.trainer.data.prepare.jester import GAUGE, JesterSettings
from tightrec.trainer.data.prepare.movielens import MovieLensSettings

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

USERS = b"1::F::1::10::48067\n2::M::56::16::70072\n5::M::25::20::55455-1234\n"
MOVIES = (
    b"1::Toy Story (1995)::Animation|Children's|Comedy\n"
    b"9::Am\xe9lie: a (film) (2001)::Comedy|Romance\n"
    b"4::Nothing (1995)::\n"
)
RATINGS = [(1, 1, 5), (1, 9, 3), (2, 4, 4), (5, 9, 1), (5, 1, 4), (5, 4, 2)]


def movielens_folder(folder: Path, **changed: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    files = {
        "users.dat": USERS,
        "movies.dat": MOVIES,
        "ratings.dat": b"".join(b"%d::%d::%d::978300760\n" % rating for rating in RATINGS),
        **{name.replace("_", "."): text for name, text in changed.items()},
    }
    for name, text in files.items():
        (folder / name).write_bytes(text)
    return folder


def prepare(cls: type, run: Callable[..., Schema], **settings: Any) -> tuple[Schema, str]:
    told = io.StringIO()
    return run(from_words(cls, words(**settings), "prepare"), Console(file=told, width=200)), told.getvalue()


def prepare_movielens(**settings: Any) -> tuple[Schema, str]:
    return prepare(MovieLensSettings, movielens.prepare, **settings)


def prepare_jester(**settings: Any) -> tuple[Schema, str]:
    return prepare(JesterSettings, jester.prepare, **settings)


def all_rows(folder: Path, schema: Schema) -> pa.Table:
    return pa.concat_tables([read_split(folder, split) for split in schema.rows])


@pytest.mark.parametrize("tabbed", [False, True])
def test_a_rating_becomes_a_row_with_all_that_is_known_of_user_and_film(tmp_path: Path, tabbed: bool) -> None:
    folder = movielens_folder(tmp_path / "in")
    if tabbed:
        (folder / "ratings.dat").unlink()
        text = b"".join(b"%d\t%d\t%d\r\n" % rating for rating in RATINGS)
        (folder / "ratings.tsv.xz").write_bytes(lzma.compress(text))
    schema, _ = prepare_movielens(src=folder, dst=tmp_path / "out", valid_share=0.2, test_share=0.2)
    assert schema.dense == ()
    sizes = {"user": 3, "gender": 2, "age": 3, "occupation": 3, "zip": 3, "movie": 3, "year": 2, "genres": 4}
    assert {column.name: column.cardinality for column in schema.sparse} == sizes
    assert [column.name for column in schema.sparse if column.multi_hot] == ["genres"]
    assert schema.rows == {"train": 4, "valid": 1, "test": 1}
    people = {1: (0, 0, 0, 0, 0), 2: (1, 1, 2, 1, 2), 5: (2, 1, 1, 2, 1)}
    # Genres in ascending order: Animation, Children's, Comedy, Romance.
    films = {1: (0, 0, [0, 1, 2]), 9: (2, 1, [2, 3]), 4: (1, 0, [])}
    expected = [(float(r >= 4), *people[user], *films[movie]) for user, movie, r in RATINGS]
    table = all_rows(tmp_path / "out", schema)
    assert table.column_names == ["label", *sizes]
    found = list(zip(*table.to_pydict().values(), strict=True))
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert str(table.schema.field("genres").type).startswith("list<")
    assert table.schema.field("genres").type.value_type == pa.int64()


@pytest.mark.parametrize(
    ("changed", "message", "left"),
    [
        (
            {"users_dat": USERS + b"7::X::1::1::1\n"},
            r"users.dat, line 4: the gender is neither F nor M: 'X'",
            6,
        ),
        ({"users_dat": USERS + b"7::F::1::1\n"}, r"users.dat, line 4: 4 columns where 5 belong", 6),
        ({"users_dat": USERS + b"7::F::old::1::1\n"}, r"users.dat, line 4: age is not .* integer: 'old'", 6),
        ({"users_dat": USERS + USERS}, r"users.dat, line 4: this user stands twice: '1'", 6),
        (
            {"movies_dat": MOVIES + b"7::No Year::Drama\n"},
            r"movies.dat, line 4: .*year in parentheses: 'No Y",
            6,
        ),
        ({"ratings_dat": b"1::1::5::0\n1::1::6::0\n"}, r"ratings.dat, line 2: the rating .*: '6'", 1),
        ({"ratings_dat": b"3::1::5::0\n"}, r"ratings.dat, line 1: users.dat does not know this user: '3'", 0),
        (
            {"ratings_dat": b"1::2::5::0\n"},
            r"ratings.dat, line 1: movies.dat does not know this movie: '2'",
            0,
        ),
        ({"ratings_dat": b"1::1::5::0\n\n"}, r"ratings.dat, line 2: 1 columns where 4 belong", 1),
        ({"ratings_dat": b"1::1::\x005::0\n"}, r"ratings.dat, line 1: the line holds a NUL byte", 0),
        ({"ratings_dat": b""}, r"ratings.dat: the file is empty", 0),
        ({"ratings_dat": lzma.compress(b"1::1::5::0\n" * 9)[:-9]}, r"damaged or cut short", 9),
    ],
)
def test_bad_movielens_lines_are_named_in_strict_mode_and_counted_in_tolerant_mode(
    tmp_path: Path, changed: dict[str, bytes], message: str, left: int
) -> None:
    folder = movielens_folder(tmp_path / "in", **changed)
    with pytest.raises(ValueError, match=message):
        prepare_movielens(src=folder, dst=tmp_path / "out")
    settings = {"errors": "tolerant", "max_bad_share": 1}
    if left:
        schema, told = prepare_movielens(src=folder, dst=tmp_path / "out", **settings)
        assert sum(schema.rows.values()) == left
        assert sum(schema.preparation["bad_lines"].values()) >= 1
        assert (tmp_path / "out" / "rejects.jsonl").read_text().count("\n") >= 1
        assert "bad (" in told
    else:
        with pytest.raises(ValueError, match="no row to train on"):
            prepare_movielens(src=folder, dst=tmp_path / "out", **settings)


def jester_line(ratings: dict[int, float], count: int | None = None) -> str:
    fields = [f"{ratings[joke]:g}" if joke in ratings else "99" for joke in range(1, 101)]
    return ",".join([str(len(ratings) if count is None else count), *fields]) + "\n"


def jester_folder(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "jester-data-1.csv").write_text(text)
    return folder


def test_a_rated_joke_becomes_a_row_with_the_gauge_ratings_as_features(tmp_path: Path) -> None:
    gauge = dict(zip(GAUGE, np.linspace(-10, 10, 10).round(2), strict=True))
    del gauge[8]
    users = [{**gauge, 1: 0.01, 6: -3.5, 100: 10}, {5: 9.99, 14: 0, 2: 7.25}]
    folder = jester_folder(tmp_path / "in", "".join(map(jester_line, users)))
    schema, _ = prepare_jester(src=folder, dst=tmp_path / "out", valid_share=0, test_share=0.2)
    assert schema.rows == {"train": 4, "test": 1}
    assert schema.dense == tuple(f"gauge_{joke}" for joke in GAUGE)
    levels = [f"gauge_{joke}_level" for joke in GAUGE]
    assert schema.sparse_names == ["user", "joke", *levels]
    assert [column.cardinality for column in schema.sparse] == [2, 90] + [21] * 10
    others = [joke for joke in range(1, 101) if joke not in GAUGE]
    found = {
        (row["user"], others[row["joke"]]): row for row in all_rows(tmp_path / "out", schema).to_pylist()
    }
    labels = {key: row["label"] for key, row in found.items()}
    assert labels == {(0, 1): 1, (0, 6): 0, (0, 100): 1, (1, 14): 0, (1, 2): 1}
    for (user, _), row in found.items():
        for joke in GAUGE:
            rating = users[user].get(joke)
            assert row[f"gauge_{joke}"] == pytest.approx(0 if rating is None else rating / 10, abs=1e-6)
            level = 0 if rating is None else min(int(np.floor(rating + 10)), 19) + 1
            assert row[f"gauge_{joke}_level"] == level


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3,1,2\n", "line 2: 3 columns where 101 belong"),
        (jester_line({1: 10.5}), r"line 2: the rating of joke 1 is neither within -10 and 10 nor 99: '10.5'"),
        (
            jester_line({2: 1}, count=7),
            r"line 2: the first column does not tell the 1 ratings of the line: '7'",
        ),
        (jester_line({3: 1}).replace(",1,", ",one,"), r"line 2: the rating of joke 3 is not a number: 'one'"),
        (jester_line({3: 1}).replace(",1,", ",nan,"), r"line 2: the rating of joke 3 is not a number: 'nan'"),
        (jester_line({3: 1}).replace("1,", ",", 1), "line 2: "),
        ("x" + jester_line({3: 1}), "line 2: the number of ratings is not a number: 'x1'"),
    ],
)
def test_bad_jester_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = jester_folder(tmp_path / "in", jester_line({1: 1, 5: 2}) + line + jester_line({2: 2}))
    with pytest.raises(ValueError, match=f"jester-data-1.csv, {message}"):
        prepare_jester(src=folder, dst=tmp_path / "out")
    schema, _ = prepare_jester(src=folder, dst=tmp_path / "out", errors="tolerant", max_bad_share=0.5)
    assert sum(schema.rows.values()) == 2
    (reject,) = [json.loads(each) for each in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reject["line"] == 2


def test_the_seed_shuffles_and_a_broken_off_run_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "PART_ROWS", 40)
    text = "".join(jester_line(dict.fromkeys(range(1, 101), 1)) for _ in range(4))
    folder = jester_folder(tmp_path / "in", text)
    prepare_jester(src=folder, dst=tmp_path / "whole")
    prepare_jester(src=folder, dst=tmp_path / "other", seed=1)
    assert tree(tmp_path / "whole").keys() == tree(tmp_path / "other").keys()
    jokes = read_split(tmp_path / "whole", "train")["joke"].to_pylist()
    assert jokes != read_split(tmp_path / "other", "train")["joke"].to_pylist()
    assert len(set(jokes[:40])) > 20

    real, count = in_memory.write_part, Counter[str]()

    def failing(*part: Any) -> None:
        count["parts"] += 1
        if count["parts"] == 4:
            raise OSError(28, "No space left on device")
        real(*part)

    monkeypatch.setattr(in_memory, "write_part", failing)
    with pytest.raises(OSError, match="No space"):
        prepare_jester(src=folder, dst=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare_jester(src=folder, dst=tmp_path / "out")
    assert count["parts"] == 1 + len(list((tmp_path / "whole").rglob("*.parquet")))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "run", "rows", "label_share"),
    [("movielens1m", prepare_movielens, 999_714, 0.5753), ("jester1", prepare_jester, 1_560_671, 0.6191)],
)
def test_the_real_sets_have_the_known_rows_and_label_shares(
    tmp_path: Path, name: str, run: Callable[..., tuple[Schema, str]], rows: int, label_share: float
) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent")
    schema, _ = run(src=DATA / name, dst=tmp_path / "out")
    assert schema.rows == {
        "train": rows - 2 * round(rows / 10),
        "valid": round(rows / 10),
        "test": round(rows / 10),
    }
    total = 0.0
    for split in SPLITS:
        table = read_split(tmp_path / "out", split)
        labels = table["label"].to_numpy()
        total += labels.sum()
        assert labels.mean() == pytest.approx(label_share, abs=0.005)
        for column in schema.sparse:
            values = table[column.name].combine_chunks()
            ids = (values.flatten() if column.multi_hot else values).to_numpy()
            assert ids.min() >= 0
            assert ids.max() < column.cardinality
        for dense in schema.dense:
            assert np.abs(table[dense].to_numpy()).max() <= 1
    assert total / rows == pytest.approx(label_share, abs=1e-4)
    files = list((tmp_path / "out" / "train").iterdir())
    groups = sum(pq.ParquetFile(file).num_row_groups for file in files)
    assert groups >= schema.rows["train"] / 8_192
