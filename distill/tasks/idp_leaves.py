"""The values of a JSON text: what each is, under which path, and where it is written."""

import re
from dataclasses import dataclass

from distill.tasks.idp_schema import compact


@dataclass(frozen=True)
class Leaf:
    """A value of a JSON text that holds no other: a scalar, or an empty list or object.

    path: items[0].amount. start, end: where compact(the whole) writes it, in bytes of UTF-8, a text's quotes included.
    """

    path: str
    value: object
    start: int
    end: int

    @property
    def field(self) -> str:
        return field_of(self.path)


def field_of(path: str) -> str:
    """A path without its positions, as idp_score.leaves has it: items[].amount."""
    return re.sub(r"\[\d+\]", "[]", path)


def leaves_of(value: object) -> list[Leaf]:
    """The leaves of a JSON value in the order in which it is written."""
    found, size = [], 0

    def walk(node, path):
        nonlocal size
        if isinstance(node, dict) and node:
            for key, item in node.items():
                size += len(f"{{{compact(key)}:".encode())  # an opening brace or a comma, and the key
                walk(item, f"{path}.{key}" if path else key)
            size += 1
        elif isinstance(node, list) and node:
            for i, item in enumerate(node):
                size += 1  # a bracket or a comma
                walk(item, f"{path}[{i}]")
            size += 1
        else:
            length = len(compact(node).encode())
            found.append(Leaf(path, node, size, size + length))
            size += length

    walk(value, "")
    return found
