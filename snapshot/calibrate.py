"""Fixed ranges for the inputs of int8 layers, from what held-out rows put into them."""

from collections.abc import Iterable

import torch

from tightrec.formats.columns import Columns
from tightrec.snapshot.layers import ACTIVATION_BITS
from tightrec.snapshot.model import Scorer, behind_relu, takes_codes
from tightrec.snapshot.parts import batches
from tightrec.snapshot.ranges import Histogram

Ranges = dict[str, tuple[float, float]]
"""(lo, hi) of a layer's input, by the layer's name."""


def input_histograms(scorer: Scorer, columns: Columns, batch_size: int) -> dict[str, Histogram]:
    """A histogram of every layer's input over all rows, by the layer's name.

    Args:
        scorer: usually the float32 model.
        columns: rows with the ids that its tables know.
    """
    histograms = {name: Histogram() for name in scorer.names}
    with torch.inference_mode():
        for batch in batches(columns, batch_size):
            for name, taken in scorer.layer_inputs(*batch):
                histograms[name].update(taken)
    return histograms


def chosen_ranges(
    histograms: dict[str, Histogram], method: str, layers: Iterable[str] | None = None
) -> Ranges:
    """The fixed range of each of ``layers`` (default: all) by ``method``; without one it has dynamic ones.

    With ``mixed`` only layers behind a ReLU and the first ones of decoders have one, whose rows are all of
    one distribution: raw columns and dot products hold rare large values, which a range for all rows either
    clips or pays for with coarse steps.
    """
    names = list(histograms if layers is None else layers)
    if method == "mixed":
        chosen = [name for name in names if behind_relu(name) or takes_codes(name)]
        return {name: histograms[name].range("l2", ACTIVATION_BITS) for name in chosen}
    fixed = method != "dynamic"
    return {name: histograms[name].range(method, ACTIVATION_BITS) for name in names if fixed}
