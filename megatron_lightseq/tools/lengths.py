"""Document lengths for benchmarks of packed sequences: six named distributions and two controls, by their parameters.

Each is a mixture of components with the share of the documents that follow it. Lengths are in tokens. Sources:

* ``magi``: the 14-bin histogram of MagiAttention's benchmark, which cuts documents at a quarter of the sequence;
* ``wlb``: quantiles of the lengths shipped with WLB-LLM and DistCA: nearly uniform up to 6.6K, and 2.4 % of documents
  of 8K to 125K tokens that hold 22 % of all tokens;
* ``prolong``: continued training as in ProLong: a log-normal mix of short documents, and 60 % of the tokens in
  documents of 64K;
* ``longalign``: the 8K to 64K tokens of LongAlign's instructions, log-uniform;
* ``bimodal``: Llama 3's long-context fine-tuning: about 1K and about 37K tokens, half of the tokens each;
* ``chat``: fine-tuning on conversations: log-normal with mean 1K, nearly all below 4K;
* ``heavy`` (control): log-normal with median 2K and sigma 2, so that one document may fill the sequence;
* ``causal`` (control): one document.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_lightseq.errors import ConfigError, explain

Sampler = Callable[[random.Random], float]
_K = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthDistribution:
    """A mixture of document lengths."""

    name: str
    components: tuple[tuple[float, Sampler], ...]
    """Share of the documents, and a sampler of lengths in tokens. Empty: one document fills the sequence."""
    longest: float = 1.0
    """Documents are cut at this share of the sequence."""

    def draw(self, num_tokens: int, seed: int) -> tuple[int, ...]:
        """``cu_seqlens`` of one packed sequence: documents in random order, the last one drawn cut to fit."""
        if not self.components:
            return (0, num_tokens)
        rng = random.Random(f"{self.name} {num_tokens} {seed}")
        cut = max(1, int(num_tokens * self.longest))
        shares = list(accumulate(share for share, _ in self.components))
        samplers = [sampler for _, sampler in self.components]
        lengths: list[int] = []
        left = num_tokens
        while left:
            (sampler,) = rng.choices(samplers, cum_weights=shares)
            document = min(max(1, round(sampler(rng))), left)
            left -= document
            lengths += [min(cut, document - at) for at in range(0, document, cut)]
        rng.shuffle(lengths)
        return tuple(accumulate(lengths, initial=0))


def _uniform(low: float, high: float) -> Sampler:
    return lambda rng: rng.uniform(low, high)


def _log_uniform(low: float, high: float) -> Sampler:
    return lambda rng: math.exp(rng.uniform(math.log(low), math.log(high)))


def _log_normal(median: float, sigma: float) -> Sampler:
    return lambda rng: rng.lognormvariate(math.log(median), sigma)


_MAGI_BINS = (
    (0.22, 1, 10),
    (2.91, 11, 50),
    (5.20, 51, 100),
    (10.23, 101, 200),
    (28.19, 201, 500),
    (24.64, 501, 1024),
    (15.65, 1025, 2048),
    (7.34, 2049, 4096),
    (3.05, 4097, 8192),
    (1.29, 8193, 16384),
    (0.85, 16385, 32768),
    (0.14, 32769, 65536),
    (0.17, 65537, 131072),
    (0.14, 131073, 196608),
)
"""Percent of the documents, shortest and longest."""

_ALL = (
    LengthDistribution(
        name="magi", components=tuple((share, _uniform(a, b)) for share, a, b in _MAGI_BINS), longest=0.25
    ),
    LengthDistribution(
        name="wlb",
        components=(
            (97.63, _uniform(30, 6600)),
            (1.03, _log_uniform(8 * _K, 16 * _K)),
            (0.45, _log_uniform(16 * _K, 32 * _K)),
            (0.36, _log_uniform(32 * _K, 64 * _K)),
            (0.53, _log_uniform(64 * _K, 125 * _K)),
        ),
    ),
    LengthDistribution(
        name="prolong", components=((93.9, _log_normal(2170, 0.74)), (6.1, _uniform(64 * _K, 64 * _K)))
    ),
    LengthDistribution(name="longalign", components=((100.0, _log_uniform(8 * _K, 64 * _K)),)),
    LengthDistribution(
        name="bimodal", components=((97.3, _log_normal(750, 0.75)), (2.7, _log_normal(33 * _K, 0.5)))
    ),
    LengthDistribution(name="chat", components=((100.0, _log_normal(750, 0.75)),)),
    LengthDistribution(name="heavy", components=((100.0, _log_normal(2 * _K, 2.0)),)),
    LengthDistribution(name="causal", components=()),
)
DISTRIBUTIONS = {distribution.name: distribution for distribution in _ALL}
"""Every distribution by its name."""
PACKED = ("magi", "wlb", "prolong", "longalign", "bimodal", "chat")
"""The six distributions that results are reported for."""


def draw(name: str, num_tokens: int, seed: int) -> Sequence[int]:
    """``cu_seqlens`` of one packed sequence of ``num_tokens`` tokens, lengths drawn from the distribution ``name``.

    Raises:
        ConfigError: no distribution has that name.
    """
    if name not in DISTRIBUTIONS:
        near = difflib.get_close_matches(name, DISTRIBUTIONS, n=1)
        raise ConfigError(
            explain(
                got=f"length distribution {name!r}",
                rule=f"the distributions are {', '.join(DISTRIBUTIONS)}",
                remedy=f"The nearest name is {near[0]!r}" if near else "Choose one of them",
            )
        )
    return DISTRIBUTIONS[name].draw(num_tokens, seed)
