"""Snapshots of jobs that trained deep hash embeddings give the logits that the job's ranks gave."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from jobs import SMALL, run_job
from ranks import run_ranks
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tightrec.snapshot import load
from tightrec.snapshot.config import ExportConfig
from tightrec.snapshot.export import export
from tightrec.snapshot.parts import logits_of
from tightrec.snapshot.rows import feature_major, read_rows
from tightrec.snapshot.source import open_checkpoint
from tightrec.trainer.checkpoint import Checkpointer

pytestmark = pytest.mark.multiprocess

DECODERS = ["model.representation.hashes=16", "model.representation.decoder=[8]"]
# The model is also called between steps, which torchrec's pipelines do not let one do.
STEPS = ["train.steps=6", "train.pipeline=plain"]
KINDS = {
    "dhe": ["representation=dhe"],
    "hybrid": ["representation=hybrid", "model=dcnv2", "model.cross_layers=2", "model.cross_rank=4"],
    "select": ["representation=select", "model.representation.select=3", "data.synthetic.multi_hot=3"],
    "mixed": [
        "model.representation.features={C1: dhe, C3: hybrid}",
        "model.pooling=mean",
        "data.synthetic.multi_hot=3",
    ],
}


def _scored(rank: int, world: int, words: list[str], folder: str) -> Tensor:
    """Run a job; the logits of its whole model, tables and all, for its held-out rows, as it saves."""
    found: list[Tensor] = []
    save = Checkpointer.save

    def watched(self: Checkpointer, step: int, state: Any, *args: Any, **kwargs: Any) -> None:
        rows = feature_major(read_rows(Path(folder) / "heldout", "test", 64))
        task = state["model"].module
        # Six steps leave logits that hardly differ; these do, and are equal on all ranks.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in task.named_parameters():
            if "embedding_bag" not in name:
                parameter.data.normal_(std=0.3, generator=generator)
        task.eval()
        lengths = rows.offsets.diff().to(torch.int32)
        names = [f"C{place + 1}" for place in range(len(lengths) // len(rows.labels))]
        with torch.no_grad():
            keyed = KeyedJaggedTensor(keys=names, values=rows.ids, lengths=lengths)
            found.append(task.model(rows.dense, keyed).clone())
        task.train()
        save(self, step, state, *args, **kwargs)

    with mock.patch.object(Checkpointer, "save", watched):
        assert run_job(rank, world, words) == 0
    return found[-1]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_float32_snapshot_scores_as_the_ranks_did(tmp_path: Path, kind: str) -> None:
    words = [*SMALL, *STEPS, *DECODERS, *KINDS[kind], f"run_folder={tmp_path / 'run'}"]
    wanted, other = run_ranks(2, _scored, words, str(tmp_path / "run"), connect=False, timeout=120)
    export(
        ExportConfig(checkpoint=tmp_path / "run", out=tmp_path / "out", precision="fp32", budget_ne=0.01),
        lambda line: None,
    )
    checkpoint = open_checkpoint(tmp_path / "run")
    rows = read_rows(str(checkpoint.data), "test", 64, checkpoint.schema)
    found = logits_of(load(tmp_path / "out").scorer, rows, 64)
    assert wanted.std() > 0.01
    torch.testing.assert_close(other, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
