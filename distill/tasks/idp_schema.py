"""The JSON Schema of a result: checked before a model is loaded, narrowed to what the validator accepts."""

import json
import re
from fractions import Fraction

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema_specifications import REGISTRY
from llguidance import LLMatcher
from referencing.exceptions import Unresolvable

from distill.files import UserError, sha256

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


def compact(value):
    """JSON as the decoder writes it: no white space between tokens, no escapes that are not needed."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def schema_sha256(schema):
    """The hash by which training rows, run.json and inference know a schema: of its text in the prompt."""
    return sha256(compact(schema))[:16]


def in_schema_order(value, schema):
    """The value with the keys of its objects in the schema's order, in which the decoder writes them."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        keys = [k for k in known if k in value] + [k for k in value if k not in known]
        return {k: in_schema_order(value[k], known.get(k, {})) for k in keys}
    if isinstance(value, list):
        return [in_schema_order(v, schema.get("items", {})) for v in value]
    return value


def parse_valid(text, judge):
    """(value, None) of a text that is JSON and passes the validator, else (None, what is wrong with it)."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)  # NaN, or 1e999, which Python reads as infinity
        error = next(judge.iter_errors(value), None)
    except ValueError as e:
        return None, f"not JSON: {e}"
    except RecursionError:
        return None, "nested too deep to be checked"
    return (value, None) if error is None else (None, f"{error.json_path}: {error.message[:120]}")
