"""JSON that validates against a schema, whatever the model: the constrained decoder of infer_idp.py and eval_idp.py.

    constraint = Constraint.of(check_schema(schema), Vocabulary.of(tokenizer, model.config.vocab_size), budget)
    generate(..., max_new_tokens=budget, processor=lambda i: DocumentDecoder(constraint, budget))

llguidance builds the token mask: a token that leaves the schema has no probability. A mask alone does not end a
document, so a token is accepted only while a closing sequence after it still fits the remaining budget. What llguidance
lets pass and the validator does not (29 February 1900, second 60, ...) is narrowed in the grammar; a keyword that
cannot be enforced is refused by name. tests/bench_idp.py measures the decoder on real schemas.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import llguidance.hf
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from tqdm import tqdm

from common import prompt_ids
from distill.files import UserError
from distill.model.generate import generate
from distill.tasks.idp_schema import parse_valid

MAX_CLOSING = 4096  # tokens: a schema whose shortest document is longer is taken for one without an end
ATTEMPTS = 8  # generations of a document where the schema is not enforced in full: one greedy, the others sampled
SAMPLING_TEMPERATURE = 0.8
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass
class Vocabulary:
    """llguidance's view of a tokenizer, and the tokens that closing a document is tried with."""

    table: LLTokenizer
    quote: int
    closers: list[int]  # outside a string, in this order: null } ] " and a comma
    probes: list[int]  # where nothing closes: the longest runs of one character, then every printable ASCII character

    @classmethod
    def of(cls, tokenizer, n_vocab: int) -> "Vocabulary":
        table = llguidance.hf.from_tokenizer(tokenizer, n_vocab=n_vocab)

        def one(text):
            return table.greedy_tokenize(text)[0]

        singles = [one(chr(c)) for c in range(32, 127)]
        runs = [one(c * 64) for c in "a0- "]
        closers = [one(text) for text in ("null", "}", "]", '"', ",")]
        return cls(table, one('"'), closers, list(dict.fromkeys(runs + singles)))


def unescaped(text: bytes) -> bytes:
    """The text without its escape sequences: an odd number of quotes left is an open string."""
    return re.sub(rb"\\.", b"", text)


def too_large(text: bytes, begin: int) -> bool:
    """Whether a number that text[begin:] writes or continues is infinite as a float (1e999, 400 digits).

    It is JSON and the grammar lets it pass, but Python reads it as infinity, which no JSON can be printed from.
    """
    first = len(text[:begin].rstrip(b"+-.0123456789eE"))
    found = [m for m in NUMBER.finditer(text, first) if math.isinf(float(m[0]))]
    return any(unescaped(text[: m.start()]).count(b'"') % 2 == 0 for m in found)


def closer(state: LLMatcher, text: bytes, vocab: Vocabulary) -> list[int]:
    """One token that ends what is open in this state after `text`, as a list; [] where none does."""
    plain = unescaped(text)
    if plain.endswith(b"\\"):
        return []
    tokens = [vocab.quote] if plain.count(b'"') % 2 else vocab.closers
    return next(([t] for t in tokens if state.validate_tokens([t])), [])


def forced(state: LLMatcher, vocab: Vocabulary) -> list[int]:
    """Tokens of the text that the schema leaves no choice about."""
    return vocab.table.tokenize_bytes(state.compute_ff_bytes())


def detour(state: LLMatcher, text: bytes, vocab: Vocabulary, nodes: int = 200) -> list[int]:
    """Fewest probe tokens to a state where something closes (after a pattern, a minimum); [] if none is found.

    States that allow the same tokens are taken for one, which is right for most patterns and quick. Where that finds
    nothing (the mask does not show how far a minLength has come), the cost of reaching a state tells them apart.
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


def closing(matcher: LLMatcher, text: bytes, vocab: Vocabulary, limit: int = MAX_CLOSING) -> list[int] | None:
    """Token ids of a short way from this state, after `text`, to a complete document; None if none is found.

    Forced text first, then a closing token, else the cheapest detour to one. [] where the document is complete.
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
    """A compiled schema: the state in which every document starts, and the way from there to a shortest one."""

    vocab: Vocabulary
    start: LLMatcher
    min_closing: list[int]

    @classmethod
    def of(cls, grammar: str, vocab: Vocabulary, budget: int) -> "Constraint":
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


class DocumentDecoder:
    """One document being written within the schema and the budget (a Processor of distill/model/sampling.py).

    left: tokens that may still be written. closing: a way to the end of the document from here.
    """

    def __init__(self, constraint: Constraint, budget: int):
        self.vocab, self.matcher = constraint.vocab, constraint.start.deep_copy()
        self.closing, self.left = constraint.min_closing, budget
        self.text, self.done = b"", False

    def allowed(self) -> bytes:
        """The bit mask of the tokens that stay in the schema."""
        return self.matcher.compute_bitmask()

    def choose(self, ranked: list[int]) -> int:
        """The best candidate after which the document can still end in budget, else the next closing token."""
        end = self.vocab.table.eos_token
        self.done = self.done or self.matcher.is_stopped()
        if self.done:
            return end
        for token in ranked:
            if token == end:
                self.done = True
                return end
            way = self.way_after(token)
            text = self.text + self.vocab.table.decode_bytes([token])
            if way is not None and len(way) < self.left and not too_large(text, len(self.text)):
                break
        else:
            if not self.closing:
                self.done = True
                return end
            token, *way = self.closing
        self.matcher.consume_token(token)
        self.text += self.vocab.table.decode_bytes([token])
        self.closing, self.left = way, self.left - 1
        return token

    def way_after(self, token: int) -> list[int] | None:
        """The closing sequence after `token`, the old one where it still holds; None if there is none."""
        for skip in (4, 3, 2, 1, 0):  # what the token makes unnecessary of the old way
            way = [token, *self.closing[skip:], self.vocab.table.eos_token]
            if skip <= len(self.closing) and self.matcher.validate_tokens(way) == len(way):
                return self.closing[skip:]
        state = self.matcher.deep_copy()
        text = self.text + self.vocab.table.decode_bytes([token])
        return closing(state, text, self.vocab) if state.consume_token(token) else None


def generate_texts(
    model,
    tokenizer,
    messages: list[str],
    max_new_tokens: int,
    *,
    batch_size: int,
    constraint: Constraint | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    desc: str | None = None,
) -> list[str]:
    """One answer per user message; JSON of the schema where a constraint is given. desc: name of a progress bar."""
    with tqdm(total=len(messages), desc=desc, unit="answer", disable=desc is None) as bar:
        replies = generate(
            model,
            tokenizer,
            prompt_ids(tokenizer, messages),
            max_new_tokens,
            batch_size=batch_size,
            processor=(lambda i: DocumentDecoder(constraint, max_new_tokens)) if constraint else None,
            temperature=temperature,
            seed=seed,
            on_reply=lambda *_: bar.update(),
        )
    if constraint:  # byte for byte what the matcher accepted
        return [constraint.vocab.table.decode_bytes(reply.tokens).decode() for (reply,) in replies]
    return [reply.text for (reply,) in replies]


def generate_valid(
    ask: Callable[[list[str], int], list[str]], messages: list[str], judge: Draft202012Validator
) -> list:
    """One valid value per message, or a UserError where ATTEMPTS gave none.

    ask(messages, attempt): one answer per message; of attempt 0 the likeliest, of later ones sampled.
    """
    values, wrong = {}, {}
    for attempt in range(ATTEMPTS):
        left = [i for i in range(len(messages)) if i not in values]
        texts = ask([messages[i] for i in left], attempt)
        for i, text in zip(left, texts, strict=True):
            value, wrong[i] = parse_valid(text, judge)
            if wrong[i] is None:
                values[i] = value
        if len(values) == len(messages):
            break
    for i in set(range(len(messages))) - set(values):
        values[i] = UserError(f"no valid JSON in {ATTEMPTS} attempts, the last one: {wrong[i]}; simplify the schema")
    return [values[i] for i in range(len(messages))]
