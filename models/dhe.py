"""Deep hash embeddings: vectors of ids without a table (Kang et al. 2021, used by MP-Rec, arXiv 2302.10872).

An id is hashed k times, the hashes become k real numbers (its code), and a small network of the feature's
own, the decoder, turns them into a vector. Training and serving share this file; it needs torch alone.

Legend: T ids, k hashes, D embedding dim, H features with a deep hash embedding.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tightrec.models.config import RepresentationConfig

MOST_IDS = 2**31
"""Of a feature: products of an id and a hash's factor stay inside int64."""

_CHUNK_VALUES = 1 << 17
"""Code values that are worked on at a time, so that the steps between stay in the cache."""

_EXACT = 2**53
"""Integers below it are exact in float64."""


class Hashes(nn.Module):
    """The k universal hashes ``((a x + b) mod p) mod m`` of one feature (Carter and Wegman 1979).

    Factors are drawn from the feature's name and ``hash_seed``, whatever the machine and the library's
    release, so that no checkpoint or snapshot has to hold them. p is the least prime above m and not below
    the number of ids: with a smaller one, ids that are p apart would share all k hashes.

    Raises:
        ValueError: more ids than MOST_IDS.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self, name: str, cardinality: int, config: RepresentationConfig, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if cardinality >= MOST_IDS:
            raise ValueError(
                f"feature {name} has {cardinality:,} ids, and deep hash embeddings take fewer than "
                f"{MOST_IDS:,}. Give it a table: model.representation.features.{name}=table."
            )
        self.prime = next_prime(max(config.buckets, cardinality - 1))
        self.buckets, self.transform = config.buckets, config.transform
        self._exact = self.prime * max(cardinality, 1) < _EXACT
        draws = _draws(f"{config.hash_seed}:{name}", 2 * config.hashes)
        factors = 1 + draws[: config.hashes] % np.uint64(self.prime - 1)
        offsets = draws[config.hashes :] % np.uint64(self.prime)
        for key, values in (("a", factors), ("b", offsets)):
            tensor = torch.from_numpy(values.astype(np.int64)).to(device)
            self.register_buffer(key, tensor, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Codes float32 [T, k] of ids int64 [T], each from 0 to below the cardinality."""
        hashes = len(self.a)
        codes = torch.empty(len(ids), hashes, device=ids.device)
        step = max(1, _CHUNK_VALUES // hashes) if ids.device.type == "cpu" else max(1, len(ids))
        for start in range(0, len(ids), step):
            codes[start : start + step] = self.codes_at_once(ids[start : start + step])
        return codes

    def buckets_of(self, ids: Tensor) -> Tensor:
        """The hashes themselves, int64 [T, k], each from 0 to below ``buckets``."""
        return (self.a * ids[:, None] + self.b) % self.prime % self.buckets

    def codes_at_once(self, ids: Tensor) -> Tensor:
        """As :meth:`forward`, without working in pieces: what a traced program can hold."""
        if self._exact:
            # The same integers as `buckets_of` in a tenth of its time: int64 divides one value at a time.
            sums = torch.addcmul(self.b.double(), self.a.double(), ids[:, None].double())
            hashed = _modulo(sums, self.prime)
            if self.prime <= min(2 * self.buckets, 2**24):
                hashed = _less(hashed.float(), self.buckets)
            else:
                hashed = _modulo(hashed, self.buckets).float()
        else:
            hashed = self.buckets_of(ids).float()
        if self.transform == "uniform":
            return hashed.mul_(2 / (self.buckets - 1)).sub_(1)
        # Box-Muller: two uniform values make two normal ones; the first must not be 0.
        radius = ((hashed[:, 0::2] + 1) / self.buckets).log().mul_(-2).sqrt_()
        angle = hashed[:, 1::2] * (2 * math.pi / self.buckets)
        return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=2).flatten(1)


class Decoders(nn.Module):
    """The decoders of H features, each layer one grouped product over all of them.

    Parameters: ``weights.L`` [H, out, in] and ``biases.L`` [H, out].

    Args:
        features: H.
        dim: D, width of the last layer.
        config: k, hidden widths and the last activation.
        device: where the parameters are made.
    """

    def __init__(
        self, features: int, dim: int, config: RepresentationConfig, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.activation = config.activation
        widths = (config.hashes, *config.decoder, dim)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for inputs, outputs in itertools.pairwise(widths):
            # As torch's Linear starts.
            bound = inputs**-0.5
            weight = torch.empty(features, outputs, inputs, device=device).uniform_(-bound, bound)
            self.weights.append(nn.Parameter(weight))
            bias = torch.empty(features, outputs, device=device).uniform_(-bound, bound)
            self.biases.append(nn.Parameter(bias))

    def forward(self, codes: Tensor, counts: Sequence[int]) -> Tensor:
        """Vectors float32 [T, D] of codes [T, k]: the first ``counts[0]`` are those of the first feature."""
        values = codes
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if place:
                values = values.relu()
            values = grouped_linear(values, weight, bias, counts)
        return activate(values, self.activation)


def activate(values: Tensor, activation: str) -> Tensor:
    """What stands behind the decoder's last layer."""
    if activation == "linear":
        return values
    return {"sigmoid": torch.sigmoid, "relu": torch.relu, "mish": functional.mish}[activation](values)


def grouped_linear(values: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """One linear layer a group of rows: [T, in], [H, out, in], [H, out] -> [T, out].

    Args:
        counts: rows of each of the H groups, one group after the other; they add up to T.
    """
    assert sum(counts) == len(values), f"{sum(counts)} rows in groups, {len(values)} given"
    return _GroupedLinear.apply(values, weight, bias, tuple(counts))


class _GroupedLinear(Function):
    """torch's grouped_mm is no faster, and refuses expanded gradients and widths not multiples of 4."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.counts = counts
        out = values.new_empty(len(values), weight.shape[1])
        for group, rows in _groups(counts):
            torch.addmm(bias[group], values[rows], weight[group].t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        grad = grad.contiguous()
        wanted = ctx.needs_input_grad
        of_values = torch.empty_like(values) if wanted[0] else None
        of_weight = torch.zeros_like(weight)
        of_bias = weight.new_zeros(weight.shape[:2])
        for group, rows in _groups(ctx.counts):
            if of_values is not None:
                torch.mm(grad[rows], weight[group], out=of_values[rows])
            torch.mm(grad[rows].t(), values[rows], out=of_weight[group])
            torch.sum(grad[rows], 0, out=of_bias[group])
        return of_values, of_weight, of_bias, None


def _groups(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Number and rows of every group that has any."""
    ends = np.cumsum(counts).tolist()
    return [
        (group, slice(end - count, end))
        for group, (count, end) in enumerate(zip(counts, ends, strict=True))
        if count
    ]


def next_prime(number: int) -> int:
    """The least prime above ``number``."""
    candidate = max(2, number + 1)
    while any(candidate % divisor == 0 for divisor in range(2, math.isqrt(candidate) + 1)):
        candidate += 1
    return candidate


def _draws(words: str, count: int) -> np.ndarray:
    """``count`` values uint64: SplitMix64 (Steele et al. 2014) from the SHA-256 of ``words``."""
    seed = np.frombuffer(hashlib.sha256(words.encode()).digest()[:8], "<u8")
    mixed = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _modulo(values: Tensor, divisor: int) -> Tensor:
    """Remainders of integers float64 below 2**53, and below 2**48 divisors; overwrites them."""
    # Made a little too small, so that the quotient is right or one short, never one too large.
    quotient = (values * ((1 - 2**-50) / divisor)).floor_()
    return _less(values.sub_(quotient, alpha=divisor), divisor)


def _less(values: Tensor, divisor: int) -> Tensor:
    """Remainders of integers below two divisors."""
    return torch.where(values >= divisor, values - divisor, values)
