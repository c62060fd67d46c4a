"""The chat template as every stage renders it: the same on every day, and safe for text from outside."""

import contextlib
import functools
import re
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from distill.files import UserError

DATE = datetime(2024, 7, 26)  # where a template prints today's date (Llama 3.2): a prompt stays what it was in training
PLAIN_MARKER = re.compile(r"<\|\w+\|>|<</?\w+>>|</?[a-z_]+>|\[/?[A-Z_]+\]")
USER, ANSWER = "user-text-0", "answer-text-1"  # stand for contents where only the frame around them counts


def chat_text(tokenizer: PreTrainedTokenizerBase, user: str, answer: str | None = None) -> str:
    """The text of a user message up to the assistant's turn, or with the assistant's answer in it."""
    turns = [("user", escape_special_tokens(tokenizer, user))]
    return render(tokenizer, turns if answer is None else [*turns, ("assistant", answer)], answer is None)


def escape_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a blank in each turn marker: text from outside must not open or close a turn."""
    for marker in turn_markers(tokenizer):
        text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


@functools.lru_cache(8)  # reading them takes longer than all else that is done to a prompt
def turn_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that open or close a turn: special tokens, and what the template writes in plain text ([INST], <<SYS>>).

    Error: UserError where plain words separate the turns (USER: ... ASSISTANT: ...), for text from outside could then
    write a turn of its own.
    """
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    chat = render(tokenizer, [("user", USER), ("assistant", ANSWER), ("user", USER)], True)
    frames = [chat]
    with contextlib.suppress(Exception):  # a template refuses a system message in whatever way it likes
        frames.append(render(tokenizer, [("system", "system-text-2"), ("user", USER)], True))
    plain = sorted({marker for frame in frames for marker in PLAIN_MARKER.findall(frame)} - set(special))
    between = chat.partition(USER)[2].partition(ANSWER)[0]
    if not any(marker in between for marker in (*special, *plain)):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template separates turns by plain text ({between.strip()[:40]!r}); "
            "expected special tokens or bracketed markers"
        )
    return special + plain


@functools.lru_cache(8)
def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that the template puts after an answer; Gemma's <end_of_turn> is not its eos token."""
    after = render(tokenizer, [("user", USER), ("assistant", ANSWER)], False).rpartition(ANSWER)[2]
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return next((i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special), None)


def render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], open_turn: bool) -> str:
    """The template's text for (role, content) pairs. open_turn: whether it ends by opening the assistant's turn."""
    messages = [{"role": role, "content": content} for role, content in turns]
    template = dated(tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=open_turn
    )


@functools.lru_cache(8)
def dated(template: str) -> str:
    """The template with DATE in place of today's date."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda m: repr(DATE.strftime(m[2])), template)
