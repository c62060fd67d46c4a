"""One sequence being generated, and the choice of its next token: greedy, sampled, or by a grammar.

Each sequence draws from its own random numbers, so its sample does not depend on the batch that it ran in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

RANKED = 4  # tokens that a grammar is offered


class Processor(Protocol):
    """The grammar of one sequence."""

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit per token of the vocabulary, the lowest bit of a byte first."""

    def choose(self, ranked: list[int]) -> int:
        """The token that comes next, given up to RANKED allowed ones, the best first. The processor moves past it."""


@dataclass
class Request:
    """Sample number `sample` of prompt number `prompt`. ids: the prompt. uniform: random numbers, one per token."""

    prompt: int
    sample: int
    ids: list[int]
    max_new_tokens: int
    uniform: np.ndarray
    new_processor: Callable[[int], Processor] | None = None
    on_token: Callable[[int, int, int], None] | None = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    reported: int = 0

    def __post_init__(self):
        self.restart()

    @property
    def need(self) -> int:
        """Tokens of prompt and reply."""
        return len(self.ids) + self.max_new_tokens

    def restart(self) -> None:
        """Back to the prompt, after a batch that ran out of memory."""
        self.tokens, self.ended = [], False
        self.processor = self.new_processor(self.prompt) if self.new_processor else None

    def accept(self, token: int, ends: set[int]) -> bool:
        """Take the next token, which is no part of the text if it ends it; whether the sequence goes on."""
        if token in ends:
            self.ended = True
            return False
        self.tokens.append(token)
        if self.on_token and len(self.tokens) > self.reported:
            self.reported = len(self.tokens)
            self.on_token(self.prompt, self.sample, token)
        return len(self.tokens) < self.max_new_tokens


def random_numbers(seed: list[int], tokens: int) -> np.ndarray:
    """One uniform number in [0, 1) per token of a sequence, float32 [tokens]."""
    numbers = np.random.default_rng(seed).random(tokens, dtype=np.float32)
    return np.minimum(numbers, np.float32(1 - 2**-20))  # times a sum of probabilities it stays below that sum


def sample(logits: torch.Tensor, temperature: float | torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [N] drawn from softmax(logits [N, V] / temperature) by inverting its distribution at uniform [N]."""
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def choose(logits: torch.Tensor, requests: Sequence[Request], temperature: float) -> list[int]:
    """The next token of each request for logits [N, V], which are changed; by its grammar where it has one."""
    uniform = None
    if temperature:
        drawn = np.array([r.uniform[len(r.tokens)] for r in requests])
        uniform = torch.from_numpy(drawn).to(logits.device)
    if requests[0].processor is None:
        return (sample(logits, temperature, uniform) if temperature else logits.argmax(-1)).tolist()
    masks = torch.from_numpy(bit_masks([r.processor for r in requests]))
    ranked = ranked_tokens(forbid(logits, masks), temperature, uniform)
    return [r.processor.choose(best) for r, best in zip(requests, ranked, strict=True)]


def bit_masks(processors: Sequence[Processor]) -> np.ndarray:
    """What each processor allows next, uint8 [N, V / 8]."""
    return np.frombuffer(bytearray().join(p.allowed() for p in processors), np.uint8).reshape(len(processors), -1)


def forbid(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Set the logits [N, V] of tokens whose bit in masks [N, V / 8] is 0 to -inf, in place."""
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = masks.to(logits.device, non_blocking=True)[..., None] >> bits & 1
    return logits.masked_fill_(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def ranked_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> list[list[int]]:
    """Up to RANKED tokens per row of masked logits [N, V], the best first; when sampling, the sampled one first."""
    values, tokens = logits.topk(RANKED)
    if temperature:
        tokens = torch.cat([sample(logits, temperature, uniform)[:, None], tokens], 1)
        values = torch.cat([values[:, :1], values], 1)
    allowed = (values > -torch.inf).sum(1)
    found = torch.cat([allowed[:, None], tokens], 1).tolist()  # one copy from the device
    return [best[:n] for n, *best in found]
