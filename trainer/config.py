"""A job's whole configuration; the only module that sees Hydra.

The groups of ``conf/`` fill the dataclasses below, one field a group. Unknown settings and wrong types are
errors (:mod:`tightrec.formats.settings`); what is set but not used is named by :func:`unused_settings`.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tightrec.formats.run_folder import CHECKPOINTS
from tightrec.formats.settings import from_mapping, keys_of
from tightrec.models.config import HASHING, ModelConfig
from tightrec.sharding.config import CodecConfig, ShardingConfig
from tightrec.trainer.checkpoint import CheckpointConfig
from tightrec.trainer.compare.config import AbConfig
from tightrec.trainer.data.loader import LoaderConfig
from tightrec.trainer.data.synthetic import SyntheticConfig
from tightrec.trainer.metrics import MetricsConfig
from tightrec.trainer.optimizer import OptimizerConfig, ScheduleConfig
from tightrec.trainer.pipeline import PipelineName
from tightrec.trainer.report.config import LoggingConfig

CONF_MODULE = "tightrec.conf"
ROOT = "config"
DEFAULTS = "defaults_of_the_dataclasses"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from."""

    source: Literal["synthetic", "parquet"] = "synthetic"
    """``synthetic``: made on the fly. ``parquet``: a folder written by tightrec.trainer.data.prepare."""

    path: str | None = None
    """The prepared folder (parquet only)."""

    prepare: str | None = None
    """The command that makes ``path``, told when it is missing."""

    synthetic: SyntheticConfig = SyntheticConfig()
    """The planted model (synthetic only)."""

    loader: LoaderConfig = LoaderConfig()
    """Batches, shuffling, prefetching."""

    def __post_init__(self) -> None:
        if self.source == "parquet" and not self.path:
            raise ValueError("data.path must name a prepared folder where data.source=parquet.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = 1
    """Passes over the training split."""

    steps: int | None = None
    """Stop after this many steps in all, whatever the epochs say."""

    eval_every: int = 0
    """Steps between evaluations on the validation split; 0: at the end of each epoch."""

    eval_steps: int | None = None
    """Batches a rank reads in one evaluation; None: the whole split."""

    test: bool = True
    """Evaluate on the test split at the end, where there is one."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where a GPU answers for every local rank."""

    pipeline: PipelineName = "auto"
    """``auto`` and ``sparse_dist``: torchrec's overlapping pipeline. ``plain``: no overlap."""

    threads: int | None = None
    """Intra-op CPU threads a rank; None: what OMP_NUM_THREADS or torch says."""

    agree_every: int = 4
    """Steps between agreements of the ranks on stopping and on finite losses."""

    timeout_s: float = 300.0
    """A collective that waits longer ends the job."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When and how state is saved."""

    metrics: MetricsConfig = MetricsConfig()
    """How AUC is computed."""

    def __post_init__(self) -> None:
        for name in ("epochs", "agree_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1.")
        for name in ("steps", "eval_steps", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1, or null.")
        if self.eval_every < 0:
            raise ValueError(f"train.eval_every={self.eval_every} must be 0 or more.")
        if not self.timeout_s > 0:
            raise ValueError(f"train.timeout_s={self.timeout_s} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Looking closely at a run."""

    dry_run: bool = False
    """Build, print plan and configuration, then stop before the first step."""

    trace_step: int | None = None
    """Write a profiler trace (Chrome format) of this step and the two after it, per rank."""

    detect_anomaly: bool = False
    """autograd's anomaly detection: slow, names the operation that made the first NaN."""

    deterministic: bool = False
    """torch.use_deterministic_algorithms: errors where an operator has no deterministic form."""

    def __post_init__(self) -> None:
        if self.trace_step is not None and self.trace_step < 1:
            raise ValueError(f"debug.trace_step={self.trace_step} must be at least 1, the first step.")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Everything a training job is told."""

    name: str = "train"
    """Folder below runs/ that run folders of this kind go to."""

    run_folder: str | None = None
    """The run's own folder; None: runs/NAME/DATE_TIME."""

    resume: str | None = None
    """A run folder, or one checkpoint in it, to continue: the run's recorded overrides apply first, then
    those given; the checkpoint, or the newest complete one, is loaded. ``auto``: continue ``run_folder`` if
    it holds a complete checkpoint, else start there; for launchers that restart a job with the same words."""

    seed: int = 0
    """Seeds initial weights and data order; synthetic rows have ``data.synthetic.seed``."""

    data: DataConfig = DataConfig()
    """Where rows come from."""

    model: ModelConfig = ModelConfig()
    """Shape of the model."""

    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """Which rank holds which table."""

    codec: CodecConfig = CodecConfig()
    """The embedding exchange's number format."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizers of tables and dense layers."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rates over the steps."""

    train: TrainConfig = TrainConfig()
    """The loop."""

    logging: LoggingConfig = LoggingConfig()
    """What the run leaves behind."""

    debug: DebugConfig = DebugConfig()
    """Looking closely."""

    ab: AbConfig = AbConfig()
    """Several codecs or representations, and seeds, in one job, and their comparison."""

    def __post_init__(self) -> None:
        if self.resume == "auto" and self.run_folder is None:
            raise ValueError("resume=auto needs run_folder, the folder to continue or to start in.")


def load(overrides: Sequence[str]) -> tuple[JobConfig, dict[str, Any]]:
    """Compose the job from ``conf/`` and Hydra ``overrides``; returns it also as a plain mapping.

    With ``resume=FOLDER`` among them, the overrides recorded in that run come first.

    Raises:
        ValueError: whatever is wrong with the words, in a sentence.
    """
    overrides = [*_recorded_overrides(overrides), *overrides]
    # Hydra accepts only keys that it knows: the dataclasses' own defaults, under the files of conf/.
    defaults = OmegaConf.create(dataclasses.asdict(JobConfig()))
    # Their keys are the names of tables and features, which nobody knows yet.
    OmegaConf.set_struct(defaults.sharding.tables, False)
    OmegaConf.set_struct(defaults.codec.bound.tables, False)
    OmegaConf.set_struct(defaults.model.representation.features, False)
    ConfigStore.instance().store(name=DEFAULTS, node=defaults)
    try:
        with initialize_config_module(config_module=CONF_MODULE, version_base="1.3"):
            composed = compose(config_name=ROOT, overrides=overrides)
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_hydra_words(error)) from None
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    return from_mapping(JobConfig, values, ""), values


def yaml(plain: Mapping[str, Any]) -> str:
    """The composed configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain))).rstrip()


def unused_settings(config: JobConfig, overrides: Sequence[str]) -> list[str]:
    """Sentences about settings that were given on the command line and are not read in this job."""
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    multi_hot = config.data.source == "synthetic" and config.data.synthetic.multi_hot
    unused = {
        "run_folder": config.resume not in (None, "auto"),
        "data.loader.seed": True,
        "data.loader.shuffle_groups": not config.data.loader.shuffle,
        "data.synthetic.multi_hot_mean": not multi_hot,
        "train.metrics.bins": config.train.metrics.auc != "binned",
        "data.path": config.data.source != "parquet",
        "data.synthetic": config.data.source != "synthetic",
        "model.cross_layers": config.model.architecture != "dcnv2",
        "model.cross_rank": config.model.architecture != "dcnv2",
        **{f"model.representation.{name}": not config.model.representation.hashing for name in HASHING},
        "model.representation.select": config.model.representation.kind != "select",
        "schedule.decay_start": config.schedule.decay == "constant",
        "schedule.decay_steps": config.schedule.decay == "constant",
        "schedule.end": config.schedule.decay == "constant",
        "schedule.power": config.schedule.decay != "poly",
        "optimizer.tables.eps": config.optimizer.tables.name == "sgd",
        "optimizer.dense.eps": config.optimizer.dense.name == "sgd",
        "sharding.memory_gb": config.sharding.type != "auto",
        "codec.bound": not config.codec.framed,
        "codec.mode": not config.codec.framed,
        "codec.transport": not config.codec.framed,
        "codec.checksums": not config.codec.framed,
        "codec.refresh_every": not config.codec.framed,
        "codec.stats_every": not config.codec.framed,
        "codec.shadow_every": not config.codec.framed,
        "codec.examine_every": config.codec.mode not in ("measured", "published")
        and "auto" not in (config.codec.forward, config.codec.backward),
        "ab.seeds": not config.ab.variants,
    }
    return [
        f"{key} is set but not used: {reason}."
        for key in sorted(given)
        for setting, idle in unused.items()
        if idle and (key == setting or key.startswith(setting + "."))
        for reason in [_why_unused(setting, config)]
    ]


def _why_unused(setting: str, config: JobConfig) -> str:
    special = {
        "run_folder": "resume names the folder",
        "data.loader.seed": "seed orders the data",
        "data.loader.shuffle_groups": "data.loader.shuffle=false",
        "data.synthetic.multi_hot_mean": "data.synthetic.multi_hot=0",
        "train.metrics.bins": f"train.metrics.auc={config.train.metrics.auc}",
    }
    if setting.startswith("model.representation."):
        kind = config.model.representation.kind
        special[setting] = f"model.representation.kind={kind}"
        if setting.rpartition(".")[2] in HASHING:
            special[setting] += ", and model.representation.features has no dhe and no hybrid"
    if setting in special:
        return special[setting]
    return {
        "data": f"data.source={config.data.source}",
        "model": f"model.architecture={config.model.architecture}",
        "schedule": f"schedule.decay={config.schedule.decay}",
        "optimizer": "sgd has no eps",
        "sharding": f"sharding.type={config.sharding.type}, only the planner reads it",
        "codec": f"codec.forward={config.codec.forward}, codec.backward={config.codec.backward}, "
        f"codec.mode={config.codec.mode}",
        "ab": "ab.codecs and ab.representations are empty",
    }[setting.partition(".")[0]]


def write_record(folder: Path, plain: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Write ``folder/.hydra``: the composed configuration and the overrides that made it."""
    record = folder / ".hydra"
    record.mkdir(parents=True, exist_ok=True)
    (record / "config.yaml").write_text(yaml(plain) + "\n")
    # Not from where resume= points by now: a link such as runs/latest moves when another job starts.
    words = [*_recorded_overrides(overrides, folder), *overrides]
    kept = [word for word in words if not word.startswith("resume=")]
    (record / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))


def _recorded_overrides(overrides: Sequence[str], run: Path | None = None) -> list[str]:
    """The overrides of the run that ``overrides`` resume; ``run`` is its folder where it is known."""
    folders = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
    if not folders or folders[-1] in ("null", "", "auto"):
        return []
    folder = Path(folders[-1])
    if folder.parent.name == CHECKPOINTS:
        folder = folder.parent.parent
    recorded = (run or folder) / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise ValueError(
            f"resume={folders[-1]}: {recorded} does not exist, so this is not the folder of a run. Give the "
            "folder that the run printed at its start (it holds .hydra, checkpoints and metrics.jsonl)."
        )
    words = OmegaConf.to_container(OmegaConf.load(recorded))
    assert isinstance(words, list)
    return [str(w) for w in words if not str(w).startswith(("resume=", "run_folder="))]


def _leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Every setting of ``cls`` by its full name, those that hold others too."""
    hints = get_type_hints(cls)
    for name in keys_of(cls):
        yield prefix + name
        if dataclasses.is_dataclass(hints[name]):
            yield from _leaves(hints[name], f"{prefix}{name}.")


def _hydra_words(error: Exception) -> str:
    message = str(error).strip()
    first = message.splitlines()[0]
    if "Could not override" in first or "is not in struct" in message:
        key = first.partition("'")[2].partition("'")[0]
        near = difflib.get_close_matches(key, list(_leaves(JobConfig)), n=1)
        return f"There is no setting {key!r}." + (f" Did you mean {near[0]!r}?" if near else "")
    return message
