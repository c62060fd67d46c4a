"""The code in a model's reply: how the assistant writes it, what is taken out, and what a terminal shows meanwhile."""

import ast
import re
import sys
import textwrap
import warnings
from collections.abc import Callable

import numpy as np

from distill.files import printable

FENCE = r"^[ \t]*```"  # opens or closes a block; what follows an opening one has no further backtick
DEFINITION = r"^\s*(?:async def|def|class) "


def fenced(code: str) -> str:
    """Code as the assistant writes it, and extract_code() reads it."""
    return f"```python\n{code.strip()}\n```"


def extract_code(reply: str) -> str:
    """The code of a reply: its first fenced block with a definition, else its first block, else from its first line
    that looks like code, else all of it. A fence that is never closed ends with the reply."""
    blocks = re.findall(rf"{FENCE}[^\n`]*\n(.*?)(?:{FENCE}|\Z)", reply, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        if re.search(DEFINITION, block, flags=re.MULTILINE):
            return block.strip("\n")
    if blocks:
        return blocks[0].strip("\n")
    start = re.search(r"^(?:async def |def |class |import |from |@\w)", reply, flags=re.MULTILINE)
    return reply[start.start() if start else 0 :].strip("\n")


def only_code(reply: str) -> str:
    """extract_code() without the prose that follows code without a fence; "" for a reply that is only prose.

    A definition is code even if it is wrong or, by the limit of tokens, cut off in mid-line.
    """
    code = extract_code(reply)
    if re.search(rf"{FENCE}[^\n`]*\n", reply, flags=re.MULTILINE):
        return code
    lines = code.split("\n")
    end = next((n for n in range(len(lines), 0, -1) if does_something("\n".join(lines[:n]))), 0)
    rest = "\n".join(lines[end:])
    cut_off = end and re.match(r"[ \t]+\S", rest)
    if cut_off or re.search(r"^(?:async def|def|class) \w+ *[(:]", rest, flags=re.MULTILINE):
        return code
    return "\n".join(lines[:end]).rstrip()


def does_something(text: str) -> bool:
    """Whether text is Python that acts; a single word parses too, but does nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in strings
            nodes = list(ast.walk(ast.parse(textwrap.dedent(text))))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(n, ast.Call) or (isinstance(n, ast.stmt) and not isinstance(n, ast.Expr)) for n in nodes)


class TokenStream:
    """Gives take(text) the words of a reply as their tokens come. Call end() after the last one."""

    def __init__(self, tokenizer, take: Callable[[str, bool], None]):
        from transformers import TextStreamer

        self.streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        self.streamer.on_finalized_text = take

    def __call__(self, token: int) -> None:
        self.streamer.put(np.array([token]))

    def end(self) -> None:
        self.streamer.end()


class Screen:
    """A terminal: shows the plan word by word, and line by line what extract_code() takes from a reply with fences.

    A block is held back until it defines something, since the one that does is the code. The caller prints at the end
    what was not printed this way (no fence, or no definition).
    """

    def __init__(self):
        self.line, self.held, self.fenced, self.shown, self.done = "", [], False, False, False

    def plan(self, text, stream_end=False):
        print(printable(text), end="\n" * stream_end, file=sys.stderr, flush=True)

    def reply(self, text, stream_end=False):
        *lines, self.line = (self.line + text).split("\n")
        for line in lines + [self.line] * stream_end:
            if re.match(FENCE if self.fenced else f"{FENCE}[^`]*$", line):
                self.fenced, self.held, self.done = not self.fenced, [], self.shown
            elif self.fenced and not self.done:
                self.held.append(line)
                if self.shown or re.match(DEFINITION, line):
                    print(printable("\n".join(self.held)), flush=True)
                    self.held, self.shown = [], True
