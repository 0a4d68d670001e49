"""What predict takes, converts and refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightrec.snapshot.inputs import Batch, Inputs
from tightrec.snapshot.manifest import Feature

CPU = torch.device("cpu")
FEATURES = tuple(
    Feature(name=name, cardinality=rows) for name, rows in (("user", 5), ("item", 7), ("tag", 11))
)


def inputs(out_of_range: Any = "refuse", dense: tuple[str, ...] = ("age", "price")) -> Inputs:
    return Inputs(dense, FEATURES, out_of_range, CPU)


def sparse(**changes: Any) -> dict[str, Any]:
    return {"user": np.array([1, 4]), "item": np.array([0, 6]), "tag": np.array([10, 2]), **changes}


DENSE = np.array([[1, 2], [3, 4]], np.float32)


def told(batch: Batch) -> tuple[list[int], list[int]]:
    assert batch.ids.dtype == batch.offsets.dtype == torch.int64
    return batch.ids.tolist(), batch.offsets.tolist()


def test_ids_become_feature_major_bags_in_the_models_order() -> None:
    batch = inputs().convert(DENSE, dict(reversed(sparse().items())))
    assert told(batch) == ([1, 4, 0, 6, 10, 2], [0, 1, 2, 3, 4, 5, 6])
    assert batch.dense.dtype == torch.float32 and batch.dense.tolist() == DENSE.tolist()
    assert not batch.of_torch and len(batch) == 2


BAGS = [[3, 0, 9], [2]]
FORMS: dict[str, Any] = {
    "pair": (np.array([3, 0, 9, 2]), np.array([0, 3, 4])),
    "pair of lists": ([3, 0, 9, 2], [0, 3, 4]),
    "pair of tensors": (torch.tensor([3, 0, 9, 2]), torch.tensor([0, 3, 4], dtype=torch.int32)),
    "lists": BAGS,
    "arrays": [np.array(bag) for bag in BAGS],
    "tensors": [torch.tensor(bag) for bag in BAGS],
    "tuples": [tuple(bag) for bag in BAGS],
}


@pytest.mark.parametrize("form", list(FORMS))
def test_bags_may_be_given_in_every_form(form: str) -> None:
    batch = inputs().convert(DENSE, sparse(tag=FORMS[form]))
    assert told(batch) == ([1, 4, 0, 6, 3, 0, 9, 2], [0, 1, 2, 3, 4, 7, 8])
    assert batch.of_torch == ("tensors" in form)


@pytest.mark.parametrize(
    "tag",
    [
        [10, 2],
        np.array([10, 2], np.int32),
        np.array([10, 2], np.uint64),
        np.array([10, 2], ">i8"),
        np.array([[10], [2]]),
        [[10], [2]],
        torch.tensor([10, 2], dtype=torch.int16),
        torch.tensor([[10], [2]]),
    ],
)
def test_a_single_id_may_be_of_any_integer_type_and_form(tag: Any) -> None:
    assert told(inputs().convert(DENSE, sparse(tag=tag))) == ([1, 4, 0, 6, 10, 2], [0, 1, 2, 3, 4, 5, 6])


def test_a_matrix_holds_bags_of_equal_size_and_bags_may_be_empty() -> None:
    batch = inputs().convert(DENSE, sparse(item=np.array([[1, 2], [3, 4]]), tag=[[], [5]]))
    assert told(batch) == ([1, 4, 1, 2, 3, 4, 5], [0, 1, 2, 4, 6, 6, 7])
    batch = inputs().convert(DENSE, sparse(item=np.zeros((2, 0), np.int64), tag=([], [0, 0, 0])))
    assert told(batch) == ([1, 4], [0, 1, 2, 2, 2, 2, 2])


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_neither_copies_nor_originals_are_shared(form: str) -> None:
    given, dense = sparse(), DENSE.copy()
    if form == "torch":
        given, dense = {k: torch.from_numpy(v) for k, v in given.items()}, torch.from_numpy(dense)
    batch = inputs("overflow").convert(dense, given)
    assert batch.of_torch == (form == "torch")
    given["user"][0] = 3
    dense[0, 0] = 9
    assert batch.ids[0] == 1 and batch.dense[0, 0] == 1
    given["user"][0] = 77
    batch = inputs("overflow").convert(dense, given)
    assert batch.ids[0] == 5 and given["user"][0] == 77


@pytest.mark.parametrize(
    "dense",
    [
        DENSE,
        DENSE.astype(np.float64),
        DENSE.astype(np.int64),
        DENSE.astype(np.float16),
        DENSE.tolist(),
        np.asfortranarray(DENSE),
        DENSE[::-1][::-1],
        torch.from_numpy(DENSE),
        torch.from_numpy(DENSE).double(),
        torch.from_numpy(DENSE).bfloat16(),
        torch.from_numpy(DENSE).clone().requires_grad_(True),
    ],
)
def test_dense_may_be_any_real_numbers(dense: Any) -> None:
    batch = inputs().convert(dense, sparse())
    assert (
        batch.dense.dtype == torch.float32 and batch.dense.is_contiguous() and not batch.dense.requires_grad
    )
    assert batch.dense.tolist() == DENSE.tolist()


def test_a_read_only_array_is_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    dense = DENSE.copy()
    dense.flags.writeable = False
    inputs().convert(dense, sparse())
    assert not recwarn.list


def test_a_model_without_dense_columns_takes_none_or_an_empty_matrix() -> None:
    bare = inputs(dense=())
    assert bare.convert(None, sparse()).dense.shape == (2, 0)
    assert bare.convert(np.zeros((2, 0)), sparse()).dense.shape == (2, 0)
    with pytest.raises(ValueError, match=r"dense has shape \[2, 2\] where \[2, 0\] is due"):
        bare.convert(DENSE, sparse())


def test_an_empty_batch_is_taken_in_every_form() -> None:
    nothing = np.zeros(0, np.int64)
    for tag in (nothing, [], np.zeros((0, 3), np.int64), ([], [0]), torch.zeros(0, dtype=torch.int64)):
        batch = inputs().convert(np.zeros((0, 2)), {"user": nothing, "item": nothing, "tag": tag})
        assert told(batch) == ([], [0]) and len(batch) == 0
        assert batch.dense.shape == (0, 2)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "missing": (DENSE, {"user": [1], "item": [1]}, r"missing: tag.*The model has user, item, tag"),
    "unknown": (DENSE, sparse(colour=[1, 2]), r"unknown: colour"),
    "both": (DENSE, {"user": [1], "item": [1], "tags": [1]}, r"missing: tag; unknown: tags"),
    "no mapping": (DENSE, [1, 2, 3], r"must map the names of features to ids, not be a list"),
    "None": (DENSE, None, r"not be a NoneType"),
    "other rows": (DENSE, sparse(tag=np.array([1])), r"feature 'tag' has 1 rows where 'user' has 2"),
    "other rows, bags": (
        DENSE,
        sparse(item=[[1], [2], [3]]),
        r"feature 'item' has 3 rows where 'user' has 2",
    ),
    "float ids": (
        DENSE,
        sparse(item=np.array([1.0, 2.0])),
        r"feature 'item': ids must be integers, not float64",
    ),
    "float tensor": (DENSE, sparse(item=torch.ones(2)), r"feature 'item': ids must be integers, not float32"),
    "float tensors": (
        DENSE,
        {k: torch.from_numpy(v).double() for k, v in sparse().items()},
        r"feature 'user': ids must be integers, not float64",
    ),
    "bools": (DENSE, sparse(item=np.array([True, False])), r"feature 'item': ids must be integers, not bool"),
    "text": (DENSE, sparse(item=["1", "2"]), r"feature 'item': ids must be integers"),
    "objects": (DENSE, sparse(item=[2**70, 1]), r"feature 'item': ids must be integers, not object"),
    "None in ids": (DENSE, sparse(item=[1, None]), r"feature 'item': ids must be integers"),
    "scalar": (DENSE, sparse(item=3), r"feature 'item': ids must have 1 or 2 dimensions, not 0"),
    "three dimensions": (
        DENSE,
        sparse(item=np.zeros((2, 1, 1), np.int64)),
        r"feature 'item': ids must have 1 or 2 dimensions, not 3",
    ),
    "all of three dimensions": (
        DENSE,
        {name: np.zeros((2, 1, 1), np.int64) for name in sparse()},
        r"feature 'user': ids must have 1 or 2 dimensions, not 3",
    ),
    "negative": (DENSE, sparse(item=np.array([0, -1])), r"feature 'item': row 1 has id -1, .* 0 and 6"),
    "too large": (DENSE, sparse(user=np.array([5, 0])), r"feature 'user': row 0 has id 5, .* 0 and 4: map"),
    "tensor too large": (
        DENSE,
        {k: torch.from_numpy(v) for k, v in sparse(tag=np.array([0, 2**62])).items()},
        r"feature 'tag': row 1 has id 4611686018427387904",
    ),
    "unsigned": (
        DENSE,
        sparse(tag=np.array([1, 2**64 - 1], np.uint64)),
        r"feature 'tag': row 1 has id 9223372036854775807",
    ),
    "in a bag": (DENSE, sparse(tag=[[1, 2, 3], [], [0, 11]][::2]), r"feature 'tag': row 1 has id 11"),
    "after empty bags": (
        np.zeros((4, 2)),
        {"user": [0] * 4, "item": [0] * 4, "tag": ([1, -5], [0, 0, 1, 1, 2])},
        r"feature 'tag': row 3 has id -5",
    ),
    "float in a bag": (DENSE, sparse(tag=[[1], [2, 3.5]]), r"feature 'tag': row 1: ids must be integers"),
    "nested bags": (DENSE, sparse(tag=[[1], [[2]]]), r"feature 'tag': row 1: ids must have 1 dimensions"),
    "mixed": (DENSE, sparse(tag=[[1], 2]), r"feature 'tag': row 1 is a int where other rows are lists"),
    "ragged": (DENSE, sparse(tag=[np.zeros((1, 1), np.int64), [1, 2]]), r"feature 'tag': row 0 is a ndarray"),
    "triple": (DENSE, sparse(tag=([1], [0, 1], [1])), r"feature 'tag': a tuple must be \(values, offsets\)"),
    "float offsets": (DENSE, sparse(tag=([1], [0.0, 1.0, 1.0])), r"feature 'tag': offsets must be integers"),
    "offsets fall": (DENSE, sparse(tag=([1, 2], [0, 3, 2])), r"feature 'tag': offsets fall at row 1"),
    "offsets begin": (DENSE, sparse(tag=([1, 2], [1, 1, 2])), r"feature 'tag': offsets must begin with 0"),
    "offsets end": (DENSE, sparse(tag=([1, 2], [0, 1, 3])), r"feature 'tag': offsets must .* values, 2"),
    "no offsets": (DENSE, sparse(tag=([], [])), r"feature 'tag': offsets must begin with 0"),
    "values of two dimensions": (DENSE, sparse(tag=([[1]], [0, 1, 1])), r"values must have 1 dimensions"),
    "no dense": (None, sparse(), r"dense is missing: the model has the columns age, price"),
    "dense rows": (DENSE[:1], sparse(), r"dense has shape \[1, 2\] where \[2, 2\] is due"),
    "dense columns": (DENSE[:, :1], sparse(), r"dense has shape \[2, 1\] where \[2, 2\] is due"),
    "dense vector": (DENSE[0], sparse(), r"dense has shape \[2\] where \[2, 2\] is due"),
    "NaN": (np.array([[1, 2], [3, np.nan]]), sparse(), r"dense column 'price': row 1 is nan"),
    "infinite": (torch.tensor([[1, 2], [-torch.inf, 4]]), sparse(), r"dense column 'age': row 1 is -inf"),
    "past float32": (np.array([[1, 1e300], [3, 4]]), sparse(), r"dense column 'price': row 0 is inf"),
    "dense text": ([["1", "2"], ["3", "4"]], sparse(), r"dense must be a rectangular array of real"),
    "dense ragged": ([[1.0, 2.0], [3.0]], sparse(), r"dense must be a rectangular array of real"),
    "dense complex": (DENSE.astype(complex), sparse(), r"dense must be a rectangular array of real"),
    "tensor complex": (torch.ones(2, 2) * 1j, sparse(), r"dense must be a rectangular array of real"),
    "dense objects": ([[1.0, None], [3.0, 4.0]], sparse(), r"dense must be a rectangular array of real"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
@pytest.mark.filterwarnings("error")
def test_a_mistake_is_refused_by_name(wrong: str) -> None:
    dense, given, says = WRONG[wrong]
    with pytest.raises(ValueError, match=says):
        inputs().convert(dense, given)


def test_an_unknown_way_with_ids_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="out_of_range='clamp' is not known"):
        inputs("clamp")


def test_ids_out_of_range_become_the_overflow_row_if_told() -> None:
    lenient = inputs("overflow")
    far = np.iinfo(np.int64)
    single = sparse(user=np.array([far.min, 2]), tag=np.array([far.max, 11]))
    assert told(lenient.convert(DENSE, single))[0] == [5, 2, 0, 6, 11, 11]
    bags = sparse(user=[[-1, 2], [3, 5]], tag=np.array([2**64 - 1, 10], np.uint64))
    assert told(lenient.convert(DENSE, bags))[0] == [5, 2, 3, 5, 0, 6, 11, 10]


def test_a_tensor_anywhere_is_remembered() -> None:
    assert inputs().convert(torch.from_numpy(DENSE), sparse()).of_torch
    assert inputs().convert(DENSE, sparse(tag=torch.tensor([1, 2]))).of_torch
    assert inputs().convert(DENSE, sparse(user=torch.tensor([1, 2]))).of_torch
    assert inputs().convert(DENSE, sparse(tag=([1, 2], torch.tensor([0, 1, 2])))).of_torch


def as_form(bags: list[list[int]], form: int) -> Any:
    """One of the forms that the bags allow."""
    values, offsets = [i for bag in bags for i in bag], np.cumsum([0, *map(len, bags)])
    sizes = set(map(len, bags))
    if form == 1:
        return np.array(values, np.int64), offsets
    if form == 2 and len(sizes) == 1:
        return torch.tensor(bags, dtype=torch.int64).reshape(len(bags), -1)
    if form == 3 and sizes == {1}:
        return np.array(values)
    return bags


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_every_mixture_of_forms_gives_the_same_bags(data: st.DataObject, rows: int) -> None:
    given_sparse, ids, sizes = {}, [], []
    for feature in FEATURES:
        bag = st.lists(st.integers(0, feature.cardinality - 1), max_size=3)
        one = st.lists(st.integers(0, feature.cardinality - 1), min_size=1, max_size=1)
        bags = data.draw(st.lists(one if data.draw(st.booleans()) else bag, min_size=rows, max_size=rows))
        given_sparse[feature.name] = as_form(bags, data.draw(st.integers(0, 3)))
        ids += [i for bag_ids in bags for i in bag_ids]
        sizes += [len(bag_ids) for bag_ids in bags]
    batch = inputs(dense=()).convert(None, given_sparse)
    assert told(batch) == (ids, [0, *np.cumsum(sizes).tolist()])
