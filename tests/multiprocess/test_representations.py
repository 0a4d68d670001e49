"""Jobs with deep hash embeddings on gloo ranks: trained alike, resumed, resharded, refused, compared."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import SMALL, job, losses, records, summary
from ranks import RankFailure, run_ranks

from tightrec.formats.checkpoint_files import MANIFEST, _crc_of, latest_complete
from tightrec.trainer.config import load

pytestmark = pytest.mark.multiprocess

HASHED = [
    "model.representation.hashes=8",
    "model.representation.buckets=1000",
    "model.representation.decoder=[6]",
]
KINDS = {
    "dhe": ["representation=dhe", *HASHED],
    "hybrid": ["representation=hybrid", *HASHED],
    "select": ["representation=select", "model.representation.select=[C1,C3]", *HASHED],
    "mixed": [
        "representation=dhe",
        "model.representation.features={C1: table, C2: hybrid}",
        "model.representation.transform=gaussian",
        "model.representation.activation=mish",
        *HASHED,
    ],
}
FEW = ["data.synthetic.multi_hot=2"]
NARROW = [*FEW, "train.test=false", "train.eval_steps=1"]


# ---- what the ranks hold


def _decoders(rank: int, world: int, words: list[str]) -> dict[str, list[Any]]:
    """What of a model is the same everywhere, after a few steps of the trainer's own parts."""
    from tightrec.trainer.build import build_task, open_sources
    from tightrec.trainer.data.loader import Loader
    from tightrec.trainer.pipeline import build_pipeline
    from tightrec.trainer.ranks import connected

    config, _ = load([*SMALL, *words])
    with connected("cpu", 60) as ranks:
        source = open_sources(config.data)["train"]
        built = build_task(config, ranks, source.schema)
        loader = Loader(source, config.data.loader, ranks.rank, ranks.world, dedup=config.codec.dedup)
        batches = iter(list(loader.iterate(loader.start(0), steps=5)))
        pipeline = build_pipeline(config.train.pipeline, built.task, built.optimizer, ranks.device)
        held = {n: p for n, p in built.task.named_parameters() if "hashed_arch" in n}
        before = {name: parameter.detach().clone() for name, parameter in held.items()}
        for _ in range(5):
            pipeline.progress(batches)
        moved = [name for name, parameter in held.items() if not torch.equal(parameter, before[name])]
        return {
            "names": sorted(held),
            "moved": sorted(moved),
            "values": [parameter.detach().tolist() for parameter in held.values()],
            "exchanged": [row.table for row in built.plan],
        }


@pytest.mark.parametrize("kind", ["dhe", "hybrid"])
def test_decoders_are_trained_alike_on_every_rank_and_are_in_no_plan(kind):
    one, other = run_ranks(2, _decoders, [*FEW, *KINDS[kind]], connect=False, timeout=120)
    assert len(one["names"]) == 4
    assert one["moved"] == one["names"]
    assert one["values"] == other["values"]
    assert len(one["exchanged"]) == (0 if kind == "dhe" else 26)


# ---- whole jobs


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_job_goes_on_bit_for_bit_and_on_other_numbers_of_ranks(tmp_path: Path, kind: str):
    # 640 rows on 2 ranks of 32: 10 steps an epoch.
    words = [*NARROW, *KINDS[kind], "codec=lossy"]
    job(2, tmp_path / "whole", *words)
    job(2, tmp_path / "part", *words, "train.steps=6")
    saved = latest_complete(tmp_path / "part" / "checkpoints")
    assert saved is not None
    job(2, tmp_path / "part", f"resume={saved}", "train.steps=null", small=False)
    assert len(losses(tmp_path / "whole")) == 10
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    for world in (1, 3):
        job(world, tmp_path / "part", f"resume={saved}", "train.steps=8", small=False)
        resumed = json.loads((latest_complete(tmp_path / "part" / "checkpoints") / MANIFEST).read_text())
        assert (resumed["world"], resumed["step"]) == (world, 8)
        # The same weights make the loss of the next step, on rows that the ranks share out in another way.
        assert losses(tmp_path / "part")[7] == pytest.approx(losses(tmp_path / "whole")[7], abs=0.35)


@pytest.mark.parametrize("kind", ["hybrid", "mixed"])
def test_pipelines_and_deduplication_compute_the_same(tmp_path: Path, kind: str):
    words = [*NARROW, *KINDS[kind], "train.steps=5"]
    job(2, tmp_path / "a", *words)
    job(2, tmp_path / "b", *words, "train.pipeline=plain")
    job(2, tmp_path / "c", *words, "codec.dedup=false")
    assert len(losses(tmp_path / "a")) == 5
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "c") == pytest.approx(losses(tmp_path / "a"), abs=1e-5)


def test_a_job_without_any_table_trains_and_sends_nothing(tmp_path: Path):
    words = [*FEW, *KINDS["dhe"], "train.epochs=3", "codec=lossy", "sharding=row_wise"]
    words += ["optimizer.tables.lr=0.5", "train.pipeline=sparse_dist", "logging.split_every=5"]
    job(2, tmp_path, *words)
    found = summary(tmp_path)
    assert found["status"] == "finished"
    assert found["bytes_per_step"] == {"input": 0, "forward": 0, "backward": 0}
    assert found["plan"] == []
    assert found["size"]["features"] == {"table": 0, "dhe": 26, "hybrid": 0}
    # 8 x 6 + 6 and 6 x 8 + 8 parameters a feature.
    assert found["size"]["dhe_parameters"] == 26 * (54 + 56)
    assert found["size"]["table_parameters"] == 0
    assert found["time_split_ms"]["dense"] > 0
    told = losses(tmp_path)
    assert sum(told[s] for s in range(25, 31)) < sum(told[s] for s in range(1, 7))
    warned = [r["text"] for r in records(tmp_path, "warning")]
    for setting in ("codec", "sharding", "optimizer.tables.lr", "train.pipeline"):
        assert f"{setting} is set but not used: no feature has a table." in warned
    assert "No feature has a table" not in (tmp_path / "report.html").read_text()


def test_probes_of_a_budget_see_the_hashed_vectors(tmp_path: Path):
    words = [*NARROW, *KINDS["hybrid"], "codec=budget", "codec.bound.probe_every=3", "train.steps=7"]
    job(2, tmp_path, *words)
    probes = records(tmp_path, "probe")
    assert probes
    assert all(abs(probe["total_dne"]) < 0.5 for probe in probes)


# ---- resuming


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    job(1, folder, *NARROW, *KINDS["select"], "train.steps=3")
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["representation=hybrid"], "feature C1 was dhe, is hybrid"),
        (["model.representation.features.C2=dhe"], "feature C2 was table, is dhe"),
        # The shapes of these fit, so nothing else would notice.
        (["model.representation.hash_seed=1"], "hash_seed was 0, is 1"),
        (["model.representation.buckets=999"], "buckets was 1000, is 999"),
        (["model.representation.activation=relu"], "activation was sigmoid, is relu"),
    ],
)
def test_another_representation_is_refused_by_name(trained: Path, words: list[str], told: str):
    # One folder for all: words that were refused must not come back with the next resume.
    with pytest.raises((ValueError, RankFailure), match=re.escape(told)):
        job(1, trained, f"resume={trained}", *words, "train.steps=4", small=False)


def test_settings_that_no_feature_reads_do_not_matter(tmp_path: Path):
    job(1, tmp_path, *NARROW, "train.steps=3")
    job(1, tmp_path, f"resume={tmp_path}", "model.representation.hash_seed=4", "train.steps=4", small=False)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]


def test_a_checkpoint_from_before_representations_goes_on(tmp_path: Path):
    job(1, tmp_path, *NARROW, "train.steps=3")
    manifest = latest_complete(tmp_path / "checkpoints") / MANIFEST
    values = json.loads(manifest.read_text())
    del values["extra"]["model"]["representation"], values["crc32"]
    manifest.write_text(json.dumps({**values, "crc32": _crc_of(values)}))
    job(1, tmp_path, f"resume={tmp_path}", "train.steps=4", small=False)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]


# ---- comparison


def _compared(rank: int, world: int, words: list[str]) -> int:
    from tightrec.trainer.compare.ab import run_all
    from tightrec.trainer.job import run

    return run_all(load(words)[0], words, run)


def test_a_job_compares_representations_with_their_sizes(tmp_path: Path):
    words = [*SMALL, *FEW, *HASHED, "train.steps=3", f"run_folder={tmp_path}"]
    words += ["ab.representations=[table,dhe,hybrid,select]", "ab.seeds=[0]"]
    words += ["model.representation.select=[C2]"]
    assert run_ranks(2, _compared, words, connect=False, timeout=200) == [0, 0]
    sizes = {kind: summary(tmp_path / f"{kind}_0")["size"] for kind in ("table", "dhe", "hybrid", "select")}
    assert sizes["hybrid"]["dhe_parameters"] == sizes["dhe"]["dhe_parameters"] == 26 * 110
    assert sizes["hybrid"]["table_parameters"] == sizes["table"]["table_parameters"] > 0
    assert sizes["select"]["features"] == {"table": 25, "dhe": 1, "hybrid": 0}
    page = (tmp_path / "comparison.html").read_text()
    assert "Representations" in page
    assert "25 / 1 / 0" in page
    assert "do not compare" not in page
    assert f"{sizes['hybrid']['parameters']:,}" in page
