"""Generation through transformers' own generate, for architectures that a SlotCache cannot hold."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from distill.model.sampling import Request, choose


@torch.inference_mode()
def generate_in_batches(
    model: PreTrainedModel,
    requests: list[Request],
    batch_size: int,
    pad: int,
    ends: set[int],
    temperature: float,
    finish: Callable[[Request], None],
) -> None:
    """Complete requests, `batch_size` at a time, those of similar length together."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    requests = sorted(requests, key=lambda r: -r.need)
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(r.ids) for r in batch)
        ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in batch], device=model.device)
        with without_generation_config(base):
            base.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(r.max_new_tokens for r in batch),
                eos_token_id=sorted(ends),
                pad_token_id=pad,
                logits_processor=[NextToken(batch, ends, temperature)],
            )
        for request in batch:
            finish(request)


@contextlib.contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within it transformers' generate does not read the decoding settings of the checkpoint."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class NextToken(LogitsProcessor):
    """Chooses every row's next token and leaves no other to transformers' generate."""

    def __init__(self, requests: list[Request], ends: set[int], temperature: float):
        self.requests, self.ends, self.temperature = requests, ends, temperature
        self.active = list(range(len(requests)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full((len(scores),), min(self.ends), device=scores.device)
        if self.active:
            requests = [self.requests[row] for row in self.active]
            tokens = choose(scores[self.active], requests, self.temperature)
            chosen[self.active] = torch.tensor(tokens, device=scores.device)
            going = [r.accept(token, self.ends) for r, token in zip(requests, tokens, strict=True)]
            self.active = [row for row, goes_on in zip(self.active, going, strict=True) if goes_on]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
