"""JSON that validates against a schema, whatever the model: the constrained decoder of infer_idp.py and eval_idp.py.

    constraint = Constraint.of(check_schema(schema), Vocabulary.of(tokenizer, model.config.vocab_size), budget)
    model.generate(..., max_new_tokens=budget, logits_processor=[SchemaLogitsProcessor(constraint, rows, budget)])

llguidance builds the token mask: a token that leaves the schema has no probability. A mask alone does not end a
document, so a token is accepted only while a closing sequence behind it still fits what is left of the budget. What
llguidance lets pass and the validator does not (29 February 1900, second 60, ...) is narrowed in the grammar; a keyword
that cannot be enforced is refused by name. Nothing here needs a model; tests/bench_idp.py measures it on real schemas.
"""

import math
import re
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import LogitsProcessor

from common import prompt_ids
from distill.files import UserError
from distill.tasks.idp_schema import parse_valid

MAX_CLOSING = 4096  # tokens: a schema whose shortest document is longer is taken for one without an end
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass
class Vocabulary:
    """llguidance's view of a tokenizer, and the tokens that closing a document is tried with."""

    table: LLTokenizer
    quote: int
    closers: list  # outside a string, in this order: null } ] " and a comma
    probes: list  # where nothing closes: the longest runs of one character, then every printable ASCII character

    @classmethod
    def of(cls, tokenizer, n_vocab):
        table = llguidance.hf.from_tokenizer(tokenizer, n_vocab=n_vocab)

        def one(text):
            return table.greedy_tokenize(text)[0]

        singles = [one(chr(c)) for c in range(32, 127)]
        runs = [one(c * 64) for c in "a0- "]
        closers = [one(text) for text in ("null", "}", "]", '"', ",")]
        return cls(table, one('"'), closers, list(dict.fromkeys(runs + singles)))


def unescaped(text):
    """The text (bytes) without what is escaped: an odd number of quotes left is an open string."""
    return re.sub(rb"\\.", b"", text)


def too_large(text, begin):
    """Whether a number that text[begin:] writes or goes on with is infinite as a float (1e999, 400 digits).

    It is JSON and the grammar lets it pass, but Python reads it as infinity, which no JSON can be printed from.
    """
    first = len(text[:begin].rstrip(b"+-.0123456789eE"))
    found = [m for m in NUMBER.finditer(text, first) if math.isinf(float(m[0]))]
    return any(unescaped(text[: m.start()]).count(b'"') % 2 == 0 for m in found)


def closer(state, text, vocab):
    """One token that ends what is open in this state behind `text`, as a list; [] where none does."""
    plain = unescaped(text)
    if plain.endswith(b"\\"):
        return []
    tokens = [vocab.quote] if plain.count(b'"') % 2 else vocab.closers
    return next(([t] for t in tokens if state.validate_tokens([t])), [])


def forced(state, vocab):
    """Tokens of the text that the schema leaves no choice about."""
    return vocab.table.tokenize_bytes(state.compute_ff_bytes())


def detour(state, text, vocab, nodes=200):
    """Fewest probe tokens to a state where something closes (behind a pattern, a minimum); [] if none is found.

    States that allow the same tokens are taken for one: right for most patterns, and quick. Where that finds nothing
    (a minLength is counted, not seen in what is allowed) they are told apart by the cost of reaching them.
    """
    for by_cost in (False, True):
        queue, seen, order = [(0, 0, state, [])], set(), count(1)
        while queue and len(seen) < nodes:
            cost, _, here, path = heappop(queue)
            if path and (here.is_accepting() or closer(here, text + vocab.table.decode_bytes(path), vocab)):
                return path
            mask = here.compute_bitmask()
            key = (cost if by_cost else 0, mask)
            if key in seen:
                continue
            seen.add(key)
            for token in vocab.probes:
                if mask[token >> 3] >> (token & 7) & 1:
                    child = here.deep_copy()
                    child.consume_token(token)
                    step = [token, *forced(child, vocab)]
                    child.consume_tokens(step[1:])
                    heappush(queue, (cost + len(step), next(order), child, path + step))
    return []


def closing(matcher, text, vocab, limit=MAX_CLOSING):
    """Token ids of a short way from this state, behind `text` (bytes), to a complete document; None if none is found.

    Forced text first, then what closes, else the cheapest detour to it. [] where the document is complete.
    """
    state, out = matcher.deep_copy(), []
    while not state.is_accepting():
        step = forced(state, vocab) or closer(state, text, vocab) or detour(state, text, vocab)
        if not step or len(out) + len(step) > limit or not state.consume_tokens(step):
            return None
        out += step
        text += vocab.table.decode_bytes(step)
    return out


@dataclass
class Constraint:
    """A compiled schema: where every document starts, and the way from there to the shortest one that we know."""

    vocab: Vocabulary
    start: LLMatcher
    min_closing: list

    @classmethod
    def of(cls, grammar, vocab, budget):
        """Errors: UserError where the schema has no finite document, or none within `budget` tokens."""
        start = LLMatcher(vocab.table, grammar, log_level=0)
        if start.is_error():
            raise UserError(f"schema: cannot be compiled: {start.get_error().splitlines()[0][:160]}")
        shortest = closing(start, b"", vocab)
        if shortest is None:
            raise UserError(f"schema: no document of at most {MAX_CLOSING} tokens found; expected one that can end")
        if budget < len(shortest):
            need = len(shortest)
            raise UserError(f"--max_new_tokens {budget}: the shortest document of this schema takes {need} tokens")
        return cls(vocab, start, shortest)


@dataclass
class Row:
    """One document being written: its parser, the way to its end, and the tokens left to write it with."""

    matcher: LLMatcher
    closing: list
    left: int
    text: bytes = b""
    done: bool = False


class SchemaLogitsProcessor(LogitsProcessor):
    """Chooses the next token of every row inside the schema and the budget; generate() then has no other choice.

    The choice is made here because it must be known before it is taken back: greedy, or Gumbel-max at `temperature`.
    """

    def __init__(self, constraint, rows, budget, temperature=0.0):
        self.vocab = constraint.vocab
        self.rows = [Row(constraint.start.deep_copy(), constraint.min_closing, budget) for _ in range(rows)]
        self.nothing = bytes(len(constraint.start.compute_bitmask()))
        self.temperature = temperature

    def __call__(self, input_ids, scores):
        """scores (rows, vocabulary), masked in place: one token a row is left."""
        masks = b"".join(self.nothing if r.done else r.matcher.compute_bitmask() for r in self.rows)
        bits = np.unpackbits(np.frombuffer(masks, np.uint8).reshape(len(self.rows), -1), axis=1, bitorder="little")
        allowed = torch.from_numpy(bits[:, : scores.shape[1]]).to(scores.device, torch.bool)
        scores.masked_fill_(~allowed, -torch.inf)
        ranked = scores
        if self.temperature:
            ranked = scores.float() / self.temperature - torch.empty_like(scores).exponential_().log()
        values, tokens = ranked.topk(4)
        best = [
            [t for v, t in zip(vs, ts, strict=True) if v > -torch.inf]
            for vs, ts in zip(values.tolist(), tokens.tolist(), strict=True)
        ]
        chosen = [self.choose(row, candidates) for row, candidates in zip(self.rows, best, strict=True)]
        scores.fill_(-torch.inf)
        scores[torch.arange(len(chosen)), chosen] = 0
        return scores

    def choose(self, row, candidates):
        """The best candidate behind which the document can still end in budget, else the next closing token."""
        end = self.vocab.table.eos_token
        row.done = row.done or row.matcher.is_stopped()
        if row.done:
            return end
        for token in candidates:
            if token == end:
                row.done = True
                return end
            way = self.way_after(row, token)
            text = row.text + self.vocab.table.decode_bytes([token])
            if way is not None and len(way) < row.left and not too_large(text, len(row.text)):
                break
        else:
            if not row.closing:
                row.done = True
                return end
            token, *way = row.closing
        row.matcher.consume_token(token)
        row.text += self.vocab.table.decode_bytes([token])
        row.closing, row.left = way, row.left - 1
        return token

    def way_after(self, row, token):
        """The closing sequence behind `token`, the old one where it still holds; None if there is none."""
        for skip in (4, 3, 2, 1, 0):  # what the token makes unnecessary of the old way
            way = [token, *row.closing[skip:], self.vocab.table.eos_token]
            if skip <= len(row.closing) and row.matcher.validate_tokens(way) == len(way):
                return row.closing[skip:]
        state = row.matcher.deep_copy()
        text = row.text + self.vocab.table.decode_bytes([token])
        return closing(state, text, self.vocab) if state.consume_token(token) else None


ATTEMPTS = 8  # generations of a document where the schema is not enforced in full: one greedy, the others sampled
SAMPLING_TEMPERATURE = 0.8


@torch.inference_mode()
def generate(model, tokenizer, prompts, max_new_tokens, constraint=None, temperature=0.0):
    """Answers to user messages: list[str] -> list[str], one batch; JSON of the schema where a constraint is given."""
    ids = prompt_ids(tokenizer, prompts)
    width = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(i)) + i for i in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids], device=model.device)
    processors = []
    if constraint:
        processors = [SchemaLogitsProcessor(constraint, len(prompts), max_new_tokens, temperature)]
    out = model.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=processors,
    )
    if constraint:
        return [row.text.decode() for row in processors[0].rows]
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate_valid(model, tokenizer, prompts, constraint, judge, max_new_tokens):
    """One valid value a prompt, or a UserError where none came in ATTEMPTS, which only --lenient should meet."""
    values, wrong = {}, {}
    for attempt in range(ATTEMPTS):
        left = [i for i in range(len(prompts)) if i not in values]
        temperature = SAMPLING_TEMPERATURE if attempt else 0.0
        texts = generate(model, tokenizer, [prompts[i] for i in left], max_new_tokens, constraint, temperature)
        for i, text in zip(left, texts, strict=True):
            value, wrong[i] = parse_valid(text, judge)
            if wrong[i] is None:
                values[i] = value
        if len(values) == len(prompts):
            break
    for i in set(range(len(prompts))) - set(values):
        values[i] = UserError(f"no valid JSON in {ATTEMPTS} attempts, the last one: {wrong[i]}; simplify the schema")
    return [values[i] for i in range(len(prompts))]
