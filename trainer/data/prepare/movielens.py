"""MovieLens-1M: who rated which film at 4 or more.

One row a rating; its columns are the user with gender, age, occupation and zip code, and the film with its
year and, multi-hot, its genres. Nothing in it is a measured quantity, so that there is no dense column.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from tightrec.formats.schema import Schema, SparseColumn
from tightrec.trainer.data.prepare import inputs
from tightrec.trainer.data.prepare.in_memory import (
    BadLine,
    InMemorySettings,
    Table,
    codes,
    number,
    read_lines,
    split_line,
    write,
)
from tightrec.trainer.data.prepare.rejects import Tally
from tightrec.trainer.data.prepare.work import Work

LIKED = 4
"""Least rating, of 1 to 5, that makes the label 1."""

_YEAR = re.compile(rb"\((\d{4})\)\s*$")
USER_COLUMNS = ("user", "gender", "age", "occupation", "zip")
MOVIE_COLUMNS = ("movie", "year")


@dataclass(frozen=True, kw_only=True)
class MovieLensSettings(InMemorySettings):
    """Settings of ``prepare movielens``."""

    src: str
    """The folder that holds users.dat, movies.dat and either ratings.dat (user::movie::rating::time, as
    GroupLens ships it) or ratings.tsv (user, movie and rating between tabs); plain, .gz or .xz."""


def prepare(settings: MovieLensSettings, console: Console) -> Schema:
    """Prepare MovieLens-1M as ``settings`` say.

    Raises:
        ValueError: whatever is wrong with the settings, the input or what an earlier run left.
    """
    names = (("users.dat",), ("movies.dat",), ("ratings.dat", "ratings.tsv"))
    users, movies, ratings = (inputs.find(settings.src, *each) for each in names)
    with Work(settings.dst, overwrite=settings.overwrite, restart=settings.restart) as work:
        tally = Tally(settings.errors, settings.max_bad_share)
        reader = _Reader()
        read_lines(users, reader.user, tally, console)
        read_lines(movies, reader.movie, tally, console)
        dotted = ratings.name.startswith("ratings.dat")
        read_lines(ratings, reader.dotted_rating if dotted else reader.tabbed_rating, tally, console)
        return write(reader.table(), settings, work, [users, movies, ratings], tally, console)


class _Reader:
    """Takes in the lines of the three files."""

    def __init__(self) -> None:
        self._users: dict[int, tuple[Any, ...]] = {}
        self._movies: dict[int, tuple[int, int]] = {}
        self._genres: list[list[bytes]] = []
        self._ratings: list[tuple[int, int, int]] = []

    def user(self, line: bytes) -> None:
        """Take in ``id::gender::age::occupation::zip``."""
        user, gender, age, occupation, zip_code = split_line(line, b"::", 5)
        key = number(user, "the user")
        if gender not in (b"F", b"M"):
            raise BadLine("gender", "the gender is neither F nor M", gender)
        if key in self._users:
            raise BadLine("repeated id", "this user stands twice", user)
        self._users[key] = (key, gender, number(age, "age"), number(occupation, "occupation"), zip_code)

    def movie(self, line: bytes) -> None:
        """Take in ``id::title (year)::genre|genre|...``."""
        movie, title, genres = split_line(line, b"::", 3)
        key, year = number(movie, "the movie"), _YEAR.search(title)
        if year is None:
            raise BadLine("year", "the title does not end in a year in parentheses", title)
        if key in self._movies:
            raise BadLine("repeated id", "this movie stands twice", movie)
        self._movies[key] = (key, int(year[1]))
        self._genres.append([genre for genre in genres.split(b"|") if genre])

    def dotted_rating(self, line: bytes) -> None:
        """Take in ``user::movie::rating::time``."""
        user, movie, rating, _ = split_line(line, b"::", 4)
        self._rating(user, movie, rating)

    def tabbed_rating(self, line: bytes) -> None:
        """Take in user, movie and rating between tabs."""
        self._rating(*split_line(line, b"\t", 3))

    def _rating(self, user: bytes, movie: bytes, rating: bytes) -> None:
        row = (number(user, "the user"), number(movie, "the movie"), number(rating, "the rating"))
        if row[0] not in self._users:
            raise BadLine("unknown id", "users.dat does not know this user", user)
        if row[1] not in self._movies:
            raise BadLine("unknown id", "movies.dat does not know this movie", movie)
        if not 1 <= row[2] <= 5:
            raise BadLine("rating", "the rating is not one of 1 to 5", rating)
        self._ratings.append(row)

    def table(self) -> Table:
        """One row a rating."""
        user_ids, movie_ids, ratings = np.array(self._ratings, np.int64).reshape(-1, 3).T
        arrays: dict[str, pa.Array] = {"label": pa.array((ratings >= LIKED).astype(np.float32))}
        sparse = []
        for names, records, ids in (
            (USER_COLUMNS, self._users, user_ids),
            (MOVIE_COLUMNS, self._movies, movie_ids),
        ):
            row_of = {key: row for row, key in enumerate(records)}
            rows = np.array([row_of[key] for key in ids.tolist()], np.int64)
            for name, values in zip(names, zip(*records.values(), strict=True), strict=True):
                places, count = codes(values)
                arrays[name] = pa.array(places[rows])
                sparse.append(SparseColumn(name=name, cardinality=count))
        # ``rows`` are the movies' by now, the last of the two.
        genres, count = codes([genre for each in self._genres for genre in each])
        offsets = np.cumsum([0, *map(len, self._genres)])
        arrays["genres"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), genres).take(
            pa.array(rows)
        )
        sparse.append(SparseColumn(name="genres", cardinality=count, multi_hot=True))
        fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
        return Table(
            columns=pa.Table.from_arrays(list(arrays.values()), schema=pa.schema(fields)),
            dense=(),
            sparse=sparse,
            source="MovieLens-1M (GroupLens): users.dat, movies.dat and ratings",
            rules={
                "label_rule": f"rating >= {LIKED}",
                "ids_rule": "place of the value among the distinct ones of users.dat or movies.dat",
            },
        )
