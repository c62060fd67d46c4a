"""JSON that validates against a schema, whatever the model: the constrained decoder of infer_idp.py and eval_idp.py.

    constraint = Constraint.of(check_schema(schema), Vocabulary.of(tokenizer, model.config.vocab_size), budget)
    model.generate(..., max_new_tokens=budget, logits_processor=[SchemaLogitsProcessor(constraint, rows, budget)])

llguidance builds the token mask: a token that leaves the schema has no probability. A mask alone does not end a
document, so a token is accepted only while a closing sequence behind it still fits what is left of the budget. What
llguidance lets pass and the validator does not (29 February 1900, second 60, ...) is narrowed in the grammar; a keyword
that cannot be enforced is refused by name. Nothing here needs a model; tests/bench_idp.py measures it on real schemas.
"""

import json
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import count

import llguidance.hf
import numpy as np
import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema_specifications import REGISTRY
from llguidance import LLMatcher, LLTokenizer
from referencing.exceptions import Unresolvable
from transformers import LogitsProcessor

from common import UserError

MAX_CLOSING = 4096  # tokens: a schema whose shortest document is longer is taken for one without an end

# ---------------------------------------------------------------------------------------------------------------------
# The schema: checked before a model is loaded, narrowed to what the validator accepts

# No \uXXXX, so that a key has one spelling and cannot slip past "properties"; no white space between tokens.
GRAMMAR_OPTIONS = {"whitespace_flexible": False, "json_allowed_escapes": '"\\bfnrt'}
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
SINGLE += ("unevaluatedItems", "unevaluatedProperties")
NOT_YEAR_0 = "^(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
REAL_DAY = f"^(?:[0-9]{{4}}-(?:0[13-9]|1[0-2]|02-[01]|02-2[0-8])|{LEAP_YEAR}-02-29)"
NOT_SECOND_60 = "[0-9]{2}:[0-9]{2}:[0-5]"
NARROWER = {
    "date": [NOT_YEAR_0, REAL_DAY],
    "date-time": [NOT_YEAR_0, REAL_DAY, f"^.{{11}}{NOT_SECOND_60}"],
    "time": [f"^{NOT_SECOND_60}"],
}
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
CLASS = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
# llguidance reads \d and \w as ASCII, Python's re as Unicode: what their negations match differs
NEGATED_CLASS = re.compile(r"\\[DW]|\[\^(?:\\.|[^\]\\])*?\\[dw]")
ASCII_OR_NO_WORD = r"^(?:[\x00-\x7F]|[^\p{L}\p{N}])*$"


def validator(schema):
    """The judge of every output: draft 2020-12 with formats checked; nothing is fetched for a $ref."""
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER, registry=REGISTRY)


def rebuild(schema, visit, at="#"):
    """The schema with visit(subschema, JSON pointer) in place of every subschema, the innermost first."""
    if not isinstance(schema, dict):
        return schema
    new = dict(schema)
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            new[key] = {k: rebuild(v, visit, f"{at}/{key}/{k}") for k, v in value.items()}
        elif key in LISTS and isinstance(value, list):
            new[key] = [rebuild(v, visit, f"{at}/{key}/{i}") for i, v in enumerate(value)]
        elif key in SINGLE:
            new[key] = rebuild(value, visit, f"{at}/{key}")
    return visit(new, at)


def literals(schema):
    """The values that "enum" or "const" leaves of a schema, here or in "allOf"; None where there is neither."""
    for part in [schema, *schema.get("allOf", [])]:
        if isinstance(part, dict) and ("enum" in part or "const" in part):
            return part["enum"] if "enum" in part else [part["const"]]
    return None


def refuse(keyword, at, why):
    raise UserError(f"schema {at}: keyword '{keyword}' cannot be enforced: {why}; change it or use --lenient")


def check_references(schema):
    """UserError for a $ref that leads to a file, a URL or nothing, wherever it stands; nothing is fetched."""
    judge = validator(schema)

    def visit(s, at):
        ref = s.get("$ref", s.get("$dynamicRef"))
        if ref is None:
            return s
        if not ref.startswith("#"):
            raise UserError(f"schema {at}: $ref to '{ref[:80]}': expected a reference inside the schema (#/...)")
        try:
            judge.evolve(schema={"$ref": ref}).is_valid({})
        except Unresolvable:
            raise UserError(f"schema {at}: $ref to '{ref[:80]}': nothing is there") from None
        return s

    rebuild(schema, visit)


def set_in_class(pattern):
    """What stands in a character class of a regular expression and is a set to llguidance, a character to the judge."""
    for body in re.findall(CLASS, pattern):
        found = re.search(r"\[|&&|--|~~", re.sub(r"\\.", "", body[1:]))
        if found:
            return found[0]
    return None


def narrow(schema):
    """The schema as the grammar gets it: what it generates is a subset of what the validator accepts.

    Errors: UserError naming keyword and place where no such subset can be written.
    """
    judge = validator(schema)

    def visit(s, at):
        values = literals(s)
        if values is not None and set(s) - {"enum", "const", "type"}:
            keeps = judge.evolve(schema=s).is_valid
            return {"enum": [v for v in values if keeps(v)]}  # finitely many: the validator chooses among them
        extra = list(NARROWER.get(s.get("format"), []))
        for keyword, patterns in (
            ("pattern", [s.get("pattern", "")]),
            ("patternProperties", s.get("patternProperties", {})),
        ):
            for sign in filter(None, map(set_in_class, patterns)):
                refuse(
                    keyword, at, f"inside [...] {sign!r} is a set operation in one dialect and a character in another"
                )
            if any(map(NEGATED_CLASS.search, patterns)):
                extra.append(ASCII_OR_NO_WORD)
        step = s.get("multipleOf")
        if isinstance(step, float) and Fraction(repr(step)) != Fraction(step):
            refuse("multipleOf", at, f"in binary floating point no {step} is exact")
        if s.get("minProperties", 0) > len(s.get("required", [])) + 1:
            refuse("minProperties", at, "more properties than 'required' names plus one, and a key could come twice")
        return {**s, "allOf": [*s.get("allOf", []), *({"pattern": p} for p in extra)]} if extra else s

    return rebuild(schema, visit)


def grammar_of(schema, lenient=False):
    """llguidance's grammar of a schema, narrowed; lenient leaves out what it cannot enforce."""
    if lenient:
        options = {**GRAMMAR_OPTIONS, "lenient": True, "coerce_one_of": True}
        return LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": options}))
    draft = {"$schema": Draft202012Validator.META_SCHEMA["$id"]}  # keywords beside a $ref count, as for the validator
    narrowed = {**narrow(schema), **draft, "x-guidance": GRAMMAR_OPTIONS}
    return LLMatcher.grammar_from_json_schema(json.dumps(narrowed))


def check_schema(schema, lenient=False):
    """The grammar of a JSON Schema that can be enforced; needs no model.

    Errors: UserError for an invalid schema, a $ref to a file or URL (nothing is fetched), one without an end, and, by
    its name and place, a keyword that llguidance cannot enforce. lenient: what cannot be enforced is left out instead.
    """
    try:
        Draft202012Validator.check_schema(schema)
        schema = schema if isinstance(schema, dict) else {"allOf": [schema]}  # true and false are schemas too
        check_references(schema)
        try:
            grammar = grammar_of(schema)
            error = LLMatcher.validate_grammar(grammar)
        except UserError as e:
            if not lenient:
                raise
            error = str(e)
        if error and lenient:
            grammar = grammar_of(schema, lenient=True)
            if LLMatcher.validate_grammar(grammar):
                grammar = LLMatcher.grammar_from_json_schema({"x-guidance": GRAMMAR_OPTIONS})  # any JSON
        elif error:
            refuse_as_compiled(schema, error)
        validator(schema).is_valid({})  # finds a $ref to itself
    except SchemaError as e:
        raise UserError(f"schema {e.json_path}: not a valid JSON Schema (draft 2020-12): {e.message[:120]}") from None
    except RecursionError:
        raise UserError("schema: nested too deep, or a $ref leads to itself without an end") from None
    except UserError:
        raise
    except Exception as e:  # referencing and re have no common base class
        raise UserError(f"schema: {type(e).__name__}: {str(e).splitlines()[0][:160]}") from None
    return grammar


def refuse_as_compiled(schema, error):
    """Raise the UserError for a message of llguidance, with the keyword's name and first place."""
    first = error.splitlines()[0].strip()[:160]
    signs = {"Unknown format": "format", "oneOf": "oneOf", "Properties": "minProperties", "Pointer": "$ref"}
    signs |= {"patternProperty": "patternProperties", "regex": "pattern", "look": "pattern"}
    named = re.search(r'Unimplemented keys: \["([^"]+)"', error)
    keyword = named[1] if named else next((k for sign, k in signs.items() if sign in error), None)
    if keyword is None:
        raise UserError(f"schema: cannot be compiled: {first}; simplify it or use --lenient")
    places = []
    rebuild(schema, lambda s, at: places.append(at) if keyword in s else None)
    refuse(keyword, places[0] if places else "#", first)


# ---------------------------------------------------------------------------------------------------------------------
# The way to the end of a document


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
