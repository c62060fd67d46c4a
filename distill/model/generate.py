"""Text generation: one loop for IDP, CodeGen and local teachers.

    replies = generate(model, tokenizer, prompt_ids, max_new_tokens=256, temperature=0.8, n=4)
    replies[i][k].text  # sample k of prompt i

The decoding settings are stated here and nowhere else. Of a checkpoint's generation_config only the end tokens count: a
repetition penalty, top-k or top-p that ships with a model does not apply.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.files import UserError
from distill.model.continuous_batching import generate_continuously
from distill.model.sampling import Processor, Request, random_numbers
from distill.model.slot_cache import KeyShape, key_shape
from distill.model.transformers_generate import generate_in_batches

UNLIMITED = 2**31  # the context of a state-space model


@dataclass
class Reply:
    """One generated text. `tokens` has no end token; `ended` is False where max_new_tokens cut the text off."""

    text: str
    tokens: list[int]
    ended: bool


@torch.inference_mode()
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

    max_new_tokens: for all prompts, or one per prompt. batch_size: sequences at once, fewer where memory ends.
    processor: makes the grammar of a sequence of prompt i. temperature: 0 is greedy.
    seed: of the sampling, for all prompts or one per prompt. A sample depends on its seed, prompt number and sample
    number only, not on the batch; with one seed per prompt the prompt number plays no part.
    on_token(i, k, token), on_reply(i, k, reply): called for sample k of prompt i as they come.
    Errors: UserError for a prompt that leaves no room for max_new_tokens in the model's context;
    torch.OutOfMemoryError where a single sequence does not fit.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    seeds = [(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else [(s,) for s in seed]
    check_context(model, prompts, limits)
    replies = {}

    def finish(request: Request) -> None:
        text = tokenizer.decode(request.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        reply = replies[request.prompt, request.sample] = Reply(text, request.tokens, request.ended)
        if on_reply:
            on_reply(request.prompt, request.sample, reply)

    left = [
        Request(i, k, ids, limit, random_numbers([*own, k], limit if temperature else 0), processor, on_token)
        for i, (ids, limit, own) in enumerate(zip(prompts, limits, seeds, strict=True))
        for k in range(n)
    ]
    ends, pad, shape = end_tokens(model, tokenizer), tokenizer.pad_token_id, slot_shape(model)
    while left:
        size = min(batch_size, len(left))
        try:
            if shape:
                generate_continuously(model, shape, left, size, pad, ends, temperature, finish)
            else:
                generate_in_batches(model, left, size, pad, ends, temperature, finish)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            batch_size = size // 2
            print(f"out of memory with {size} sequences at once: continuing with {batch_size}", file=sys.stderr)
        left = [r for r in left if (r.prompt, r.sample) not in replies]
        for request in left:
            request.restart()
    return [[replies[i, k] for k in range(n)] for i in range(len(prompts))]


def context_length(model: PreTrainedModel) -> int:
    """Tokens that prompt and answer may have together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def check_context(model: PreTrainedModel, prompts: Sequence[list[int]], limits: Sequence[int]) -> None:
    """UserError for a prompt that leaves no room for its reply."""
    context = context_length(model)
    for ids, limit in zip(prompts, limits, strict=True):
        if len(ids) + limit > context:
            most = context - limit
            raise UserError(f"prompt of {len(ids)} tokens: expected at most {most}, the context less {limit} new ones")


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the tokenizer's, and all of the checkpoint's (Gemma's <end_of_turn> is only there)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def slot_shape(model: PreTrainedModel) -> KeyShape | None:
    """The shape of a preallocated cache for `model`; None, with a notice, where transformers' generate must do."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "slot_shape"):
        found = key_shape(base)
        base.slot_shape = found if isinstance(found, KeyShape) else None
        if base.slot_shape is None:
            print(f"generating by transformers' generate, which is slower: {found}", file=sys.stderr)
    return base.slot_shape
