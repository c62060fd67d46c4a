"""The choice of the next token: greedy, sampled, or by a processor that knows what may follow.

Each sequence draws from its own random numbers, so its sample does not depend on the batch that it ran in.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

RANKED = 4  # tokens that a processor is offered


class Processor(Protocol):
    """The grammar of one sequence."""

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit per token of the vocabulary, the lowest bit of a byte first."""

    def choose(self, ranked: list[int]) -> int:
        """The token that comes next, given up to RANKED allowed ones, the best first. The processor moves past it."""


def random_numbers(seed: list[int], tokens: int) -> np.ndarray:
    """One uniform number in [0, 1) per token of a sequence, float32 [tokens]."""
    numbers = np.random.default_rng(seed).random(tokens, dtype=np.float32)
    return np.minimum(numbers, np.float32(1 - 2**-20))  # times a sum of probabilities it stays below that sum


def sample(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [N] drawn from softmax(logits [N, V] / temperature) by inverting its distribution at uniform [N]."""
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def next_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """Tokens [N] for logits [N, V]: the most probable ones at temperature 0, else sampled."""
    return sample(logits, temperature, uniform) if temperature else logits.argmax(-1)


def mask_forbidden(logits: torch.Tensor, processors: Sequence[Processor]) -> torch.Tensor:
    """Set the logits [N, V] of tokens that the rows' processors do not allow to -inf, in place."""
    masks = np.frombuffer(b"".join(p.allowed() for p in processors), np.uint8).reshape(len(processors), -1)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = torch.from_numpy(masks.copy()).to(logits.device)[..., None] >> bits & 1
    return logits.masked_fill_(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def ranked_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> list[list[int]]:
    """Up to RANKED tokens per row of masked logits [N, V], the best first; when sampling, the sampled one first."""
    values, tokens = logits.topk(RANKED)
    ranked = [
        [t for v, t in zip(vs, ts, strict=True) if v > -torch.inf]
        for vs, ts in zip(values.tolist(), tokens.tolist(), strict=True)
    ]
    if temperature:
        drawn = sample(logits, temperature, uniform).tolist()
        ranked = [[t, *best] if best else [] for t, best in zip(drawn, ranked, strict=True)]
    return ranked
