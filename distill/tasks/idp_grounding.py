"""Whether a value of the JSON stands in the document, by rules that anyone can check.

    DocumentText("TOTAL RM1,234.50").holds(1234.5)  # True

- Text stands there if its letters and digits do, one after the other, from the start of a word to the end of a word.
  Case, white space, line breaks and punctuation do not count, nor does how Unicode composes a letter (NFKC).
- A number stands there if a number of the document can be read as it, to the cent: 1,234.50 as 1234.5; 1.234 as 1.234
  or 1234. Signs, currencies and units do not count. A small number often stands somewhere by chance.
- A date stands there if one of the document can be read as it: 05/03/24 as 5 March or 3 May; months also by name, in
  the five languages of the shipped corpus.

A value that does not stand there was computed, reworded, corrected or invented. One that does may still be the wrong
one, such as the cash in place of the total.
"""

import re
import unicodedata
from datetime import date

from distill.tasks.idp_leaves import leaves_of
from distill.tasks.idp_schema import literals, rebuild
from distill.tasks.idp_score import canonical

WORD = re.compile(r"[^\W_]+")
NUMBER = re.compile(r"\d+(?:[.,'’]\d+)*")
SPACED_NUMBER = re.compile(r"(?<![\d.,])(?=(\d{1,3}(?: \d{3})+(?:[.,]\d+)?)(?!\d))")  # 1 234,56
# found at every place where one begins: a number before a date would otherwise take a part of it
NUMERIC_DATE = re.compile(r"(?<!\d)(?=(\d{4}|\d\d?)(\s?[-/.]\s?|\s)(\d\d?)\2(\d{4}|\d\d?)(?!\d))")
DAY_MONTH = re.compile(r"(?<!\d)(?=(\d\d?)(?:st|nd|rd|th)?[-/. ]*([^\W\d_]{3,10})[-/., ]*(\d{4}|\d\d)(?!\d))")
MONTH_DAY = re.compile(r"\b(?=([^\W\d_]{3,10})[. ]*(\d\d?)(?:st|nd|rd|th)?[, ]+(\d{4})(?!\d))")
MONTHS = ("jan", "ene", "gen"), ("feb", "fév"), ("mar", "mär"), ("apr", "avr", "abr"), ("may", "mai", "mag")
MONTHS += ("jun", "juin", "giu"), ("jul", "juil", "lug"), ("aug", "aoû", "ago"), ("sep", "set"), ("oct", "okt", "ott")
MONTHS += ("nov",), ("dec", "dez", "déc", "dic")


class DocumentText:
    """A document as its words, numbers and dates."""

    def __init__(self, document: str):
        text = unicodedata.normalize("NFKC", document)
        words = WORD.findall(text.casefold())
        self.letters, self.bounds = "".join(words), {0}
        at = 0
        for word in words:
            for c in word:
                at += 1
                if unicodedata.category(c) == "Lo":  # Chinese, Thai, ...: no space sets words apart
                    self.bounds |= {at - 1, at}
            self.bounds.add(at)
        found = [*NUMBER.findall(text), *SPACED_NUMBER.findall(text)]
        self.numbers = {number for digits in found for number in readings(digits)}
        self.dates = dates_in(text.casefold())

    def holds(self, value: object) -> bool | None:
        """Whether a scalar stands in the document; None of true and false, and of what states nothing (null, "")."""
        if value is None or isinstance(value, bool | list | dict) or canonical(value) is None:
            return None
        kind, content = canonical(value)
        if kind == "number":
            return abs(content) in self.numbers
        return (kind == "date" and content in self.dates) or self.has_words(str(value))

    def has_words(self, text: str) -> bool:
        """Whether the letters and digits of a text stand in the document, from the start to the end of a word."""
        letters = "".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
        at = self.letters.find(letters)
        while at >= 0:
            if {at, at + len(letters)} <= self.bounds:
                return True
            at = self.letters.find(letters, at + 1)
        return False


def readings(text: str) -> set[float]:
    """The numbers, to the cent, that digits with separators may mean: {1234.5} of 1,234.50, {1.23, 1234} of 1.234.

    Where they make no number together (12.03.2018), each group of digits is one.
    """
    groups, separators = re.split(r"\D", text), re.findall(r"\D", text)
    found = set()
    if not separators or (len(set(separators)) == 1 and all(len(group) == 3 for group in groups[1:])):
        found.add(float("".join(groups)))
    if separators and separators[-1] in ".," and separators.count(separators[-1]) == 1:
        found.add(float(f"{''.join(groups[:-1])}.{groups[-1]}"))
    return {round(number, 2) for number in found or map(float, groups)}


def dates_in(text: str) -> set[str]:
    """The ISO dates that a text in lower case states, in each order in which they can be read."""
    found = [(a, b, c) if len(a) == 4 else (c, b, a) for a, _, b, c in NUMERIC_DATE.findall(text)]
    found += [(c, a, b) for a, _, b, c in NUMERIC_DATE.findall(text) if len(a) < 4]  # the month first
    named = [(year, month, day) for day, month, year in DAY_MONTH.findall(text)]
    named += [(year, month, day) for month, day, year in MONTH_DAY.findall(text)]
    for year, name, day in named:
        month = next((i for i, names in enumerate(MONTHS, 1) if name.startswith(names)), 0)
        found.append((year, month, day))
    dates = set()
    for year, month, day in found:
        try:
            dates.add(date(int(year) + 2000 * (len(year) == 2), int(month), int(day)).isoformat())
        except ValueError:  # no such day
            continue
    return dates


def listed_values(schema) -> list:
    """The values that "enum" and "const" list anywhere in a schema."""
    found = []
    rebuild(schema, lambda s, at: found.extend(literals(s) or []))
    return found


def details(value: object, document: str, schema, confidences: list[float] | None = None) -> list[dict]:
    """[{"path", "value", "confidence", "grounded"}] of the leaves of a document's value, in its order.

    grounded: None where nothing can be said: of null, true, false, what is empty, and a value that the schema lists
    and the document does not state, since that is a category and no quotation.
    """
    text, listed, leaves = DocumentText(document), listed_values(schema), leaves_of(value)
    rows = []
    for leaf, confidence in zip(leaves, confidences or [None] * len(leaves), strict=True):
        grounded = text.holds(leaf.value)
        if leaf.value in listed:
            grounded = grounded or None
        rounded = None if confidence is None else round(confidence, 6)
        rows.append({"path": leaf.path, "value": leaf.value, "confidence": rounded, "grounded": grounded})
    return rows
