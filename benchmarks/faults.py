"""A job whose ranks are killed again and again, beside the same job undisturbed: do they end alike?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/faults.py FOLDER [kills=10] [ranks=4] [steps=300] \
        [every=20] [seed=0] [key=value ...]

Runs ``python -m tightrec.trainer codec=lossy`` on synthetic data twice under torchrun: once to the end, and
once with ``kills`` SIGKILLs, each of a random rank once a random step has been logged; torchrun starts all
ranks again (``--max-restarts``) and they go on from the last checkpoint (``resume=auto``), which one step in
``every`` leaves. Words with ``=`` that are not named above go to the trainer, after the settings made here.

Prints a line for every kill, and how far the losses of all steps, the test scores and the last checkpoint's
weights of the two runs lie apart. FOLDER must not exist.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tightrec.formats.checkpoint_files import find_checkpoints

SETTINGS = [
    "codec=lossy",
    "data.synthetic.max_cardinality=5000",
    "data.synthetic.test_rows=20000",
    "data.synthetic.valid_rows=0",
    "data.loader.batch_size=64",
    "model.embedding_dim=16",
    "train.device=cpu",
    "train.timeout_s=60",
    "logging.every_steps=1",
    "logging.split_every=0",
    "logging.tensorboard=false",
]
STALL_S = 180.0
"""No new step for that long: the job hangs."""

SAME = 1e-3
"""Mean losses at the end that lie closer count as the same. Steps are not equal bit by bit: after a restart
from a checkpoint losses first differ by about 1e-9, and more with every step."""

ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torch 2.13's torchrun keeps one store for all its restarts, where ranks that start again can read the
addresses of those that were killed and fail to connect; with this, each start has a store of its own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done."""

    folder: Path
    kills: int = 10
    ranks: int = 4
    steps: int = 300
    every: int = 20
    """Steps between checkpoints."""
    seed: int = 0
    words: list[str] = field(default_factory=list)
    """For the trainer."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One that happened."""

    rank: int
    step: int
    """Last step logged before."""
    back_to: int
    """Step of the checkpoint from which the job went on."""
    again_after_s: float
    """Until the first step after it was logged."""


def main(words: list[str]) -> int:
    """Run both jobs and compare them; returns the exit status, 1 where they end apart or one fails."""
    plan = parse(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan.folder.mkdir(parents=True)
    calm, rough = plan.folder / "undisturbed", plan.folder / "killed"
    print(f"{plan.ranks} ranks, {plan.steps} steps, a checkpoint every {plan.every}", flush=True)
    with (plan.folder / "undisturbed.log").open("w") as log:
        if subprocess.run(
            command(plan, calm, restarts=0), stdout=log, stderr=log, env=ENVIRONMENT
        ).returncode:
            print(f"the undisturbed job failed: see {log.name}")
            return 1
    with (plan.folder / "killed.log").open("w") as log:
        # A session of its own, so that Ctrl-C reaches it once, through `disturbed`.
        job = subprocess.Popen(
            command(plan, rough, restarts=plan.kills),
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            kills = list(disturbed(plan, rough, job))
            status = job.wait()
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()
    if status or len(kills) < plan.kills:
        print(f"the killed job ended with status {status} after {len(kills)} kills: see {log.name}")
        return 1
    return compare(calm, rough)


def parse(words: list[str]) -> Plan:
    """The command line.

    Raises:
        SystemExit: there is no folder, or it exists.
    """
    numbers = {"kills", "ranks", "steps", "every", "seed"}
    pairs = [word.split("=", 1) for word in words if word.split("=")[0] in numbers]
    rest = [word for word in words if word.split("=")[0] not in numbers]
    folders = [Path(word) for word in rest if "=" not in word]
    if len(folders) != 1 or folders[0].exists():
        raise SystemExit("faults.py: give one folder that does not exist yet; see the top of the file.")
    given = {name: int(value) for name, value in pairs}
    return Plan(folder=folders[0], words=[word for word in rest if "=" in word], **given)


def command(plan: Plan, folder: Path, restarts: int) -> list[str]:
    """Of one job."""
    rows = (plan.steps + 8) * plan.ranks * 64
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={plan.ranks}", f"--max-restarts={restarts}", "-m", "tightrec.trainer"),
        *SETTINGS,
        f"data.synthetic.train_rows={rows}",
        f"train.steps={plan.steps}",
        f"train.checkpoint.every_steps={plan.every}",
        f"run_folder={folder}",
        "resume=auto",
        *plan.words,
    ]


def disturbed(plan: Plan, folder: Path, job: subprocess.Popen[bytes]) -> Iterator[Kill]:
    """Kill a random rank at each of ``plan.kills`` random steps, in ascending order."""
    draw = random.Random(plan.seed)
    # Not in the last steps: the job could end before its rank is found.
    targets = sorted(draw.sample(range(2, plan.steps - 10), plan.kills))
    done, mark = 0, 0
    for target in targets:
        done, mark = until_step(folder, job, mark, at_least=target)
        rank = draw.randrange(plan.ranks)
        os.kill(process_of(job.pid, rank), signal.SIGKILL)
        began = time.monotonic()
        mark = len(steps_logged(folder))
        again, _ = until_step(folder, job, mark, at_least=0)
        kill = Kill(rank=rank, step=done, back_to=again - 1, again_after_s=time.monotonic() - began)
        print(
            f"rank {rank} killed after step {done}; went on after step {kill.back_to}, "
            f"{kill.again_after_s:.1f} s later",
            flush=True,
        )
        yield kill


def steps_logged(folder: Path) -> list[int]:
    """Every step in the order in which it was logged, those repeated after a restart once more."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if record["kind"] == "train"]


def until_step(folder: Path, job: subprocess.Popen[bytes], mark: int, at_least: int) -> tuple[int, int]:
    """Wait for a step to be logged behind the first ``mark`` records; returns it and how many there are.

    Raises:
        RuntimeError: the job has ended, or logs nothing more.
    """
    changed, count = time.monotonic(), mark
    while True:
        steps = steps_logged(folder)
        for step in steps[mark:]:
            if step >= at_least:
                return (steps[-1], len(steps)) if at_least else (step, len(steps))
        if len(steps) != count:
            changed, count = time.monotonic(), len(steps)
        if job.poll() is not None or time.monotonic() - changed > STALL_S:
            raise RuntimeError(f"the job in {folder} has ended or hangs before step {at_least}")
        time.sleep(0.02)


def process_of(launcher: int, rank: int) -> int:
    """The process id of a rank started by torchrun.

    Raises:
        RuntimeError: there is none.
    """
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environ:
                    return int(child)
    raise RuntimeError(f"torchrun has no process of rank {rank}")


def compare(calm: Path, rough: Path) -> int:
    """Print how far the runs lie apart; 1 where the mean losses at the end do."""
    losses = [_records(folder, "train", "loss") for folder in (calm, rough)]
    if losses[0].keys() != losses[1].keys():
        print("the runs have logged different steps")
        return 1
    apart = [abs(losses[0][step] - losses[1][step]) for step in losses[0]]
    last = max(losses[0])
    scores = [_records(folder, "eval", "log_loss") for folder in (calm, rough)]
    weights = max(
        float((a - b).abs().max()) for a, b in zip(_weights(calm), _weights(rough), strict=True) if a.numel()
    )
    first = next((step for step in sorted(losses[0]) if losses[0][step] != losses[1][step]), None)
    quarter = [step for step in losses[0] if step > last - last // 4]
    means = [statistics.fmean(loss[step] for step in quarter) for loss in losses]
    print(f"mean loss of the last {len(quarter)} steps: {means[0]:.6f} undisturbed, {means[1]:.6f} killed")
    print(f"loss of step {last}: {losses[0][last]!r} undisturbed, {losses[1][last]!r} killed")
    differing = sum(map(bool, apart))
    print(f"largest difference of a step's loss: {max(apart):.3g} ({differing} differ, first {first})")
    print(f"test log loss: {list(scores[0].values())} undisturbed, {list(scores[1].values())} killed")
    print(f"largest difference of a saved value: {weights:.3g}")
    return int(abs(means[0] - means[1]) > SAME)


def _records(folder: Path, kind: str, name: str) -> dict[int, float]:
    """A figure by step; what was repeated after a restart counts as it was the last time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[name] for r in map(json.loads, lines) if r["kind"] == kind}


def _weights(folder: Path) -> list[torch.Tensor]:
    """Tensors of the last checkpoint, by name."""
    last = find_checkpoints(folder / "checkpoints")[-1]
    flat: dict[str, torch.Tensor] = {}
    whole = folder / "last.pt"
    dcp_to_torch_save(last, whole)
    _collect("", torch.load(whole, weights_only=False), flat)
    return [flat[name].double() for name in sorted(flat)]


def _collect(name: str, value: object, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(f"{name}/{key}", inner, found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
