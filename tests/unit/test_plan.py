"""Plans: forced types land where they should, refusals name the table, the print stays narrow."""

import pytest
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from tightrec.models.config import ModelConfig
from tightrec.models.dlrm import build_tables
from tightrec.sharding.config import CodecConfig, ShardingConfig
from tightrec.sharding.plan import Cluster, PlanRow, make_plan, plan_rows
from tightrec.sharding.plan_table import plan_json, plan_text, size

CPU = torch.device("cpu")
CARDINALITIES = [("a", 1000), ("b", 10), ("c", 500), ("d", 40), ("e", 7)]


def plan(config: ShardingConfig, world: int = 4, local: int = 4, dim: int = 16):
    tables = build_tables(CARDINALITIES, ModelConfig(embedding_dim=dim))
    cluster = Cluster(world=world, local_world=local, device=CPU)
    made = make_plan(tables, EmbeddingBagCollectionSharder(), config, cluster, 64)
    rows = plan_rows(made, tables.embedding_bag_configs(), cluster, CodecConfig(), 64, 0.0)
    return {row.table: row for row in rows}


def test_table_wise_gives_no_rank_more_than_one_table_above_another():
    rows = plan(ShardingConfig(type="table_wise"))
    held = [sum(row.ranks == (rank,) for row in rows.values()) for rank in range(4)]
    assert sorted(held) == [1, 1, 1, 2]
    assert rows["t_a"].ranks != rows["t_c"].ranks, "the two tallest tables share a rank"


def test_a_table_override_beats_the_type_and_may_be_a_pattern():
    rows = plan(ShardingConfig(type="table_wise", tables={"t_a": "row_wise", "t_[bc]": "column_wise"}))
    assert {name: row.type for name, row in rows.items()} == {
        "t_a": "row_wise",
        "t_b": "column_wise",
        "t_c": "column_wise",
        "t_d": "table_wise",
        "t_e": "table_wise",
    }


def test_an_override_that_matches_nothing_names_the_tables_there_are():
    with pytest.raises(ValueError, match=r"'t_z' matches no table.*t_a, t_b"):
        plan(ShardingConfig(type="table_wise", tables={"t_z": "row_wise"}))


def test_columns_are_cut_in_fours_over_as_many_ranks_as_divide_them():
    assert plan(ShardingConfig(type="column_wise"), world=4)["t_a"].ranks == (0, 1, 2, 3)
    assert plan(ShardingConfig(type="column_wise"), world=3, local=3)["t_a"].ranks == (0, 1)
    assert plan(ShardingConfig(type="column_wise"), world=4, dim=4)["t_a"].ranks == (0,)


def test_table_row_wise_spreads_tables_over_machines():
    rows = plan(ShardingConfig(type="table_row_wise"), world=4, local=2)
    assert {row.ranks for row in rows.values()} == {(0, 1), (2, 3)}


def test_tables_too_small_to_split_go_table_wise_or_are_refused_where_named():
    rows = plan(ShardingConfig(type="row_wise"), world=4)
    # Blocks of 3, 3, 3, 1 and of 2, 2, 2, 1 rows fill 4 ranks; 9 ranks would get nothing of 10 rows.
    assert {name: row.type for name, row in rows.items() if row.type != "row_wise"} == {}
    rows = plan(ShardingConfig(type="row_wise"), world=6, local=6)
    assert {name for name, row in rows.items() if row.type == "table_wise"} == {"t_b", "t_e"}
    with pytest.raises(ValueError, match=r"t_b has 10 rows, too few"):
        plan(ShardingConfig(type="table_wise", tables={"t_b": "row_wise"}), world=6, local=6)


def test_grid_shard_names_the_width_it_needs():
    with pytest.raises(ValueError, match=r"t_a cannot be grid_shard.*128"):
        plan(ShardingConfig(type="grid_shard"))
    assert plan(ShardingConfig(type="grid_shard"), dim=256, local=2)["t_a"].ranks == (0, 1, 2, 3)


def test_the_planner_honours_its_exclusions_on_one_rank():
    rows = plan(ShardingConfig(type="auto", exclude=("data_parallel",)), world=1, local=1)
    assert rows and all(row.type != "data_parallel" for row in rows.values())


def test_tables_that_do_not_fit_are_told_with_the_setting_to_change():
    with pytest.raises(ValueError, match=r"planner found no plan.*sharding.memory_gb"):
        plan(ShardingConfig(type="auto", memory_gb=1e-6), world=1, local=1)


@pytest.mark.parametrize("fields", [{"memory_gb": 0}, {"type": "row_wise", "exclude": ("data_parallel",)}])
def test_settings_that_contradict_are_refused(fields):
    with pytest.raises(ValueError, match=r"sharding\."):
        ShardingConfig(**fields)


def test_the_printed_plan_stays_below_100_columns_and_adds_up():
    rows = [
        PlanRow(
            table="t_a_feature_with_a_name_that_nobody_should_have_chosen_" + str(i) * 60,
            type="table_row_wise",
            ranks=tuple(range(0, 128, 2)),
            rows=10**9 + i,
            dim=512,
            memory_bytes=10**14,
            forward_bytes=10**9,
            backward_bytes=2 * 10**9,
        )
        for i in range(60)
    ]
    text = plan_text(rows)
    assert max(map(len, text.splitlines())) < 100
    assert "20 more" in text
    assert "60.0 GB" in text.splitlines()[-1] and "120.0 GB" in text.splitlines()[-1]
    assert plan_json(rows)[0]["predicted_bytes_per_step"] == 3 * 10**9


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (17e6, "17.0 MB")])
def test_sizes_read_well(count, text):
    assert size(count) == text
