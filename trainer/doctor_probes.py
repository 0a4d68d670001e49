"""One real operation per probe, each run by the doctor in a process of its own.

    python -m tightrec.trainer.doctor_probes operators|lookup|all_to_all|cuda|cupy

A probe prints one line of JSON, the fields of :class:`Finding`; a loader error, a crash or a hang takes
only its process along, and the doctor says so in words.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a probe saw."""

    ok: bool
    """Whether the operation gave the right result."""

    found: str
    """What was seen, in words."""


def operators() -> Finding:
    """Load fbgemm's operators and compare one with its definition (a cumulative sum from 0)."""
    import fbgemm_gpu
    import torch

    lengths = torch.tensor([3, 0, 2], dtype=torch.int64)
    sums = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).tolist()
    if sums != [0, 3, 3, 5]:
        return Finding(ok=False, found=f"the cumulative sum of [3, 0, 2] came out as {sums}")
    variant = getattr(fbgemm_gpu, "__variant__", "unknown")
    return Finding(ok=True, found=f"loaded, variant {variant}")


def lookup() -> Finding:
    """Look bags up, and train one step, through torchrec and fbgemm and through plain torch; compare.

    The table-batched operator runs behind torchrec's FusedEmbeddingBagCollection, on the GPU if there is
    one; the reference is ``torch.nn.functional.embedding_bag`` and a plain SGD step.
    """
    import torch
    from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=50, feature_names=["f"])
    bags = FusedEmbeddingBagCollection([table], torch.optim.SGD, {"lr": 0.5}, device=device)
    weight = bags.state_dict()["embedding_bags.t.weight"]
    ids, lengths = torch.tensor([7, 49, 0, 7, 7], device=device), torch.tensor([2, 0, 3], device=device)
    reference = weight.detach().clone().requires_grad_()
    offsets = torch.cumsum(lengths, 0) - lengths
    expected = torch.nn.functional.embedding_bag(ids, reference, offsets, mode="sum")
    pooled = bags(KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths))["f"]
    apart = float((pooled - expected).detach().abs().max())
    pooled.square().sum().backward()
    expected.square().sum().backward()
    stepped = reference.detach() - 0.5 * reference.grad
    apart = max(apart, float((bags.state_dict()["embedding_bags.t.weight"] - stepped).abs().max()))
    words = f"3 bags and one SGD step on {device.type}, {apart:.1e} from plain torch"
    return Finding(ok=apart <= 1e-5, found=words)


def all_to_all() -> Finding:
    """Exchange rows of uneven counts between two gloo processes, and check each one's share."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_exchange, args=(f"file://{folder}/store",), nprocs=2)
        received = [json.loads((Path(folder) / f"rank{rank}").read_text()) for rank in range(2)]
    # Rank r sends r + 1 numbers to rank 0 and r + 2 to rank 1, each 10 r + destination.
    expected = [[0, 10, 10], [1, 1, 11, 11, 11]]
    if received != expected:
        return Finding(ok=False, found=f"2 gloo processes received {received} instead of {expected}")
    return Finding(ok=True, found="2 gloo processes exchanged uneven counts")


def _exchange(rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    sent = [rank + 1, rank + 2]
    values = torch.tensor([10 * rank + peer for peer in range(2) for _ in range(sent[peer])])
    counts = [peer + rank + 1 for peer in range(2)]
    received = values.new_empty(sum(counts))
    dist.all_to_all_single(received, values, counts, sent)
    Path(store.removeprefix("file://")).with_name(f"rank{rank}").write_text(json.dumps(received.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def cuda() -> Finding:
    """Multiply on each GPU, and name the GPUs."""
    import torch

    if torch.version.cuda is None:
        return Finding(ok=False, found=f"torch {torch.__version__} is a build without CUDA")
    if not torch.cuda.is_available():
        return Finding(
            ok=False, found=f"torch was built for CUDA {torch.version.cuda} but finds no usable GPU"
        )
    names = []
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if float((ones @ ones).sum()) != 64.0**3:
            return Finding(ok=False, found=f"GPU {index} multiplied two matrices of ones wrongly")
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return Finding(ok=True, found=f"CUDA {torch.version.cuda}: " + "; ".join(names))


def cupy() -> Finding:
    """Compile a kernel through NVRTC and run it, as the codec's CUDA backend does."""
    import cupy

    source = 'extern "C" __global__ void twice(int* x) { x[threadIdx.x] *= 2; }'
    values = cupy.arange(4, dtype=cupy.int32)
    cupy.RawKernel(source, "twice")((1,), (4,), (values,))
    if values.tolist() != [0, 2, 4, 6]:
        return Finding(ok=False, found=f"a compiled kernel doubled 0..3 to {values.tolist()}")
    major, minor = cupy.cuda.nvrtc.getVersion()
    return Finding(ok=True, found=f"CuPy {cupy.__version__} compiled a kernel with NVRTC {major}.{minor}")


PROBES = {probe.__name__: probe for probe in (operators, lookup, all_to_all, cuda, cupy)}


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(PROBES[sys.argv[1]]())))
