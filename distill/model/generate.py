"""Text generation: one loop for IDP, CodeGen and local teachers.

    replies = generate(model, tokenizer, prompt_ids, max_new_tokens=256, temperature=0.8, n=4)
    replies[i][k].text  # sample k of prompt i

The decoding settings are stated here and nowhere else. Of a checkpoint's generation_config only the end tokens count: a
repetition penalty, top-k or top-p that ships with a model does not apply.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from distill.files import UserError
from distill.model.sampling import Processor, mask_forbidden, next_tokens, random_numbers, ranked_tokens

UNLIMITED = 2**31  # the context of a state-space model


@dataclass
class Reply:
    """One generated text. `tokens` has no end token; `ended` is False where max_new_tokens cut the text off."""

    text: str
    tokens: list[int]
    ended: bool


@dataclass
class Request:
    """One sequence to generate: sample `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    ids: list[int]
    max_new_tokens: int
    uniform: np.ndarray
    processor: Processor | None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def accept(self, token: int, ends: set[int]) -> bool:
        """Append a token unless it ends the text; whether the sequence goes on."""
        if token in ends:
            self.ended = True
        else:
            self.tokens.append(token)
        return not self.ended and len(self.tokens) < self.max_new_tokens


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int | Sequence[int],
    *,
    batch_size: int = 16,
    processor: Callable[[int], Processor] | None = None,
    temperature: float = 0.0,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    on_token: Callable[[int, int, int], None] | None = None,
    on_reply: Callable[[int, int, Reply], None] | None = None,
) -> list[list[Reply]]:
    """n replies for each prompt, a list of token ids.

    max_new_tokens: for all prompts, or one per prompt. batch_size: sequences at once.
    processor: makes the grammar of a sequence of prompt i. temperature: 0 is greedy.
    seed: of the sampling, for all prompts or one per prompt. A sample depends on its seed, prompt number and sample
    number only, not on the batch; with one seed per prompt the prompt number plays no part.
    on_token(i, k, token), on_reply(i, k, reply): called for sample k of prompt i as they come.
    Error: UserError for a prompt that leaves no room for max_new_tokens in the model's context.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    seeds = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else [(s,) for s in seed]
    context = context_length(model)
    for ids, limit in zip(prompts, limits, strict=True):
        if len(ids) + limit > context:
            most = context - limit
            raise UserError(f"prompt of {len(ids)} tokens: expected at most {most}, the context less {limit} new ones")
    jobs = [(i, k) for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) for k in range(n)]
    ends, replies = end_tokens(model, tokenizer), {}
    for start in range(0, len(jobs), batch_size):
        batch = [
            Request(
                i,
                k,
                prompts[i],
                limits[i],
                random_numbers([*seeds[i], k], limits[i] if temperature else 0),
                processor(i) if processor else None,
            )
            for i, k in jobs[start : start + batch_size]
        ]
        decode_batch(model, tokenizer.pad_token_id, batch, ends, temperature, on_token)
        for request in batch:
            text = tokenizer.decode(request.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            reply = Reply(text, request.tokens, request.ended)
            replies[request.prompt, request.sample] = reply
            if on_reply:
                on_reply(request.prompt, request.sample, reply)
    return [[replies[i, k] for k in range(n)] for i in range(len(prompts))]


def context_length(model: PreTrainedModel) -> int:
    """Tokens that prompt and answer may have together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the tokenizer's, and all of the checkpoint's (Gemma's <end_of_turn> is only there)."""
    own = base_model(model).generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, without PEFT's wrapper; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within it transformers' generate does not read the decoding settings of the checkpoint."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def decode_batch(
    model: PreTrainedModel,
    pad: int,
    requests: list[Request],
    ends: set[int],
    temperature: float,
    on_token: Callable[[int, int, int], None] | None = None,
) -> None:
    """Complete the requests by transformers' generate, in one batch."""
    model, width = base_model(model), max(len(r.ids) for r in requests)
    ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in requests], device=model.device)
    mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in requests], device=model.device)
    with without_generation_config(model):
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(r.max_new_tokens for r in requests),
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            logits_processor=[NextToken(requests, ends, temperature, on_token)],
        )


class NextToken(LogitsProcessor):
    """Chooses every row's next token and leaves no other to transformers' generate."""

    def __init__(self, requests, ends, temperature, on_token=None):
        self.requests, self.ends, self.temperature, self.on_token = requests, ends, temperature, on_token
        self.active = list(range(len(requests)))
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full((len(scores),), min(self.ends), device=scores.device)
        requests = [self.requests[row] for row in self.active]
        if requests:
            tokens = choose(scores[self.active], requests, self.temperature, self.step)
            chosen[self.active] = torch.tensor(tokens, device=scores.device)
            going = []
            for row, request, token in zip(self.active, requests, tokens, strict=True):
                if request.accept(token, self.ends):
                    going.append(row)
                if self.on_token and not request.ended:
                    self.on_token(request.prompt, request.sample, token)
            self.active = going
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def choose(logits: torch.Tensor, requests: list[Request], temperature: float, step: int) -> list[int]:
    """The next token of each request for logits [N, V], by its processor where it has one."""
    uniform = None
    if temperature:
        uniform = torch.tensor([r.uniform[step] for r in requests], device=logits.device)
    processors = [r.processor for r in requests]
    if processors[0] is None:
        return next_tokens(logits, temperature, uniform).tolist()
    ranked = ranked_tokens(mask_forbidden(logits, processors), temperature, uniform)
    return [p.choose(best) for p, best in zip(processors, ranked, strict=True)]
