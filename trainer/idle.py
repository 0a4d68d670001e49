"""Settings that were given and that this job's data or model leaves without effect."""

from collections.abc import Mapping, Sequence

from tightrec.formats.columns import Source


def idle_settings(overrides: Sequence[str], sources: Mapping[str, Source], *, tables: bool) -> list[str]:
    """Sentences about settings of the command line, and groups of it, that change nothing.

    Args:
        overrides: the words of the command line.
        sources: the data by split.
        tables: whether some feature has a table.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    tableless = (not tables, "no feature has a table")
    idle = {
        "train.eval_every": ("valid" not in sources, "the data has no valid split"),
        "train.eval_steps": (
            "valid" not in sources and "test" not in sources,
            "there is nothing to evaluate",
        ),
        "train.test": ("test" not in sources, "the data has no test split"),
        "train.pipeline": tableless,
        "model.bottom_layers": (not sources["train"].schema.dense, "the data has no dense columns"),
        "codec": tableless,
        "optimizer.tables": tableless,
        "sharding": tableless,
    }
    return [
        f"{key} is set but not used: {why}."
        for setting, (unused, why) in idle.items()
        for key in sorted(given)
        if unused and (key == setting or key.startswith(f"{setting}."))
    ]
