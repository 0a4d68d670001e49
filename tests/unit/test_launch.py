"""The launch files: their syntax, and the torchrun command each ends in, by stub commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import guards
import pytest
import yaml
from torch.distributed.run import get_args_parser

LAUNCH = guards.ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch")
RECORD = (
    '[ "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" = 110 ] && printf "%s\\n" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"\n'
)


def stub(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def launched(script: str, words: list[str], folder: Path, **environment: str) -> list[str]:
    """Run a launch script with ``folder`` first on PATH; the lines that its torchrun stub recorded."""
    kept = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    ran = subprocess.run(
        ["bash", LAUNCH / script, *words], env=kept | environment, capture_output=True, text=True, timeout=30
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def parsed(words: list[str]) -> Any:
    """The words as torchrun itself reads them: an option it does not know ends the test."""
    return get_args_parser().parse_args(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_explain_themselves(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    lines = (LAUNCH / script).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert any(f"launch/{script}" in line and line.startswith("#") for line in lines[:6])
    assert "set -euo pipefail" in lines


@pytest.mark.parametrize(
    "script", [LAUNCH / "local.sh", LAUNCH / "slurm.sbatch", guards.ROOT / ".ci" / "run"]
)
def test_scripts_pass_shellcheck(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "--shell=bash", script], check=True)


def test_local_starts_torchrun_with_every_word_as_given(tmp_path: Path) -> None:
    torchrun = stub(tmp_path, "mine", RECORD)
    words = ["data=synthetic", "run.name=two words"]
    lines = launched("local.sh", words, tmp_path, NPROC="3", OMP_NUM_THREADS="5", TORCHRUN=str(torchrun))
    assert lines[0] == "OMP_NUM_THREADS=5"
    options = parsed(lines[1:])
    assert options.standalone
    assert (options.nproc_per_node, options.module, options.training_script) == (
        "3",
        True,
        "tightrec.trainer",
    )
    assert options.training_script_args == words


def test_local_counts_gpus_and_shares_out_cores(tmp_path: Path) -> None:
    torchrun = str(stub(tmp_path, "mine", RECORD))
    stub(tmp_path, "getconf", "echo 16\n")
    stub(tmp_path, "nvidia-smi", "exit 9\n")
    lines = launched("local.sh", [], tmp_path, TORCHRUN=torchrun)
    assert (lines[0], parsed(lines[1:]).nproc_per_node) == ("OMP_NUM_THREADS=8", "2")
    stub(tmp_path, "nvidia-smi", "printf 'GPU 0: A\\nGPU 1: A\\nGPU 2: A\\nGPU 3: A\\n'\n")
    lines = launched("local.sh", [], tmp_path, TORCHRUN=torchrun)
    assert (lines[0], parsed(lines[1:]).nproc_per_node) == ("OMP_NUM_THREADS=4", "4")
    assert launched("local.sh", [], tmp_path, TORCHRUN=torchrun, NPROC="32")[0] == "OMP_NUM_THREADS=1"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NPROC": "0"}, "NPROC is '0'"),
        ({"NPROC": "two"}, "NPROC is 'two'"),
        ({"TORCHRUN": "/no/such"}, "make setup"),
    ],
)
def test_local_refuses_in_words(environment: dict[str, str], words: str) -> None:
    kept = {"PATH": os.environ["PATH"]}
    ran = subprocess.run(
        ["bash", LAUNCH / "local.sh"], env=kept | environment, capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert words in ran.stderr


SLURM = {
    "SLURM_JOB_NODELIST": "node[07-09]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_ID": "123456",
    "SLURM_CPUS_PER_TASK": "24",
    "SLURM_SUBMIT_DIR": "/shared/checkout",
}


def slurm(folder: Path, words: list[str], **environment: str) -> tuple[list[str], list[str]]:
    """What slurm.sbatch hands to srun: srun's own options, and the words of the task."""
    stub(folder, "srun", RECORD)
    names = "printf 'node07\\nnode08\\nnode09\\n'"
    stub(folder, "scontrol", f'[ "$*" = "show hostnames node[07-09]" ] && {names}\n')
    _, *lines = launched("slurm.sbatch", words, folder, **SLURM, **environment)
    first = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    return lines[:first], lines[first:]


def test_slurm_starts_one_torchrun_a_node_that_meet_at_the_first(tmp_path: Path) -> None:
    options, (torchrun, *task) = slurm(tmp_path, ["resume=runs/a b"], SLURM_GPUS_ON_NODE="8")
    assert "--ntasks-per-node=1" in options
    assert "--cpus-per-task=24" in options
    assert torchrun == "/shared/checkout/.venv/bin/torchrun"
    run = parsed(task)
    assert (run.nnodes, run.nproc_per_node) == ("3", "8")
    assert (run.rdzv_backend, run.rdzv_id, run.rdzv_endpoint) == ("c10d", "123456", "node07:23456")
    assert (run.module, run.training_script) == (True, "tightrec.trainer")
    assert run.training_script_args == ["resume=runs/a b"]


def test_slurm_without_gpus_and_with_settings(tmp_path: Path) -> None:
    assert parsed(slurm(tmp_path, [])[1][1:]).nproc_per_node == "2"
    _, (torchrun, *task) = slurm(tmp_path, [], NPROC="5", RDZV_PORT="1234", TORCHRUN="torchrun")
    run = parsed(task)
    assert (torchrun, run.nproc_per_node, run.rdzv_endpoint) == ("torchrun", "5", "node07:1234")


def test_slurm_asks_for_one_task_a_node_and_time_to_save() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = [line.split()[1] for line in lines if line.startswith("#SBATCH ")]
    assert "--ntasks-per-node=1" in asked
    (signal_s,) = [int(word.partition("TERM@")[2]) for word in asked if word.startswith("--signal=TERM@")]
    assert signal_s > 110, "more than torchrun waits for the ranks"
    # SLURM stops reading #SBATCH lines at the first command.
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The objects of kubernetes.yaml by kind."""
    text = (LAUNCH / "kubernetes.yaml").read_text()
    assert text.startswith("#")
    assert "kubectl apply -f launch/kubernetes.yaml" in text
    assert "YOUR_REGISTRY" in text.partition("apiVersion")[0], "the image's placeholder is explained"
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_kubernetes_objects_fit_together(cluster: dict[str, Any]) -> None:
    assert {kind: item["apiVersion"] for kind, item in cluster.items()} == {
        "PersistentVolumeClaim": "v1",
        "Service": "v1",
        "Job": "batch/v1",
    }
    service, job = cluster["Service"], cluster["Job"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NNODES"])
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    host, port = environment["RDZV_ENDPOINT"].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert {int(port)} == {item["port"] for item in service["spec"]["ports"]}
    assert {int(port)} == {item["containerPort"] for item in container["ports"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == environment["NPROC"]
    mounts = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    volumes = {item["name"]: item for item in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["runs"] == f"{container['workingDir']}/runs"
    claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
    assert claim == cluster["PersistentVolumeClaim"]["metadata"]["name"]
    assert cluster["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("index", [0, 1])
def test_kubernetes_pods_run_torchrun(cluster: dict[str, Any], index: int, tmp_path: Path) -> None:
    """The container's command, run here with the manifest's environment and a stub torchrun."""
    (container,) = cluster["Job"]["spec"]["template"]["spec"]["containers"]
    (indexed,) = [item for item in container["env"] if "valueFrom" in item]
    path = indexed["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environment = {item["name"]: item.get("value", str(index)) for item in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    environment |= {"TORCHRUN": str(stub(tmp_path, "torchrun", RECORD)), "PATH": os.environ["PATH"]}
    ran = subprocess.run(
        [*container["command"], *container["args"]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 0, ran.stderr
    first, *words = ran.stdout.splitlines()
    assert first == f"OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}"
    run = parsed(words)
    assert (run.nnodes, run.nproc_per_node) == (environment["NNODES"], environment["NPROC"])
    assert (run.rdzv_backend, run.rdzv_endpoint) == ("c10d", environment["RDZV_ENDPOINT"])
    assert f"is_host={'true' if index == 0 else 'false'}" in run.rdzv_conf.split(",")
    assert (run.module, run.training_script) == (True, "tightrec.trainer")
    assert run.training_script_args == container["args"][container["args"].index("--") + 1 :]
