"""The prompt of a typed question about a text, one user message:

    Answer the question about the text with one of its options.

    {state}

    {instructions}
    Options: {option}, {option}, ...

With descriptions the last line becomes "Options:" and a line "- {option}: {description}" per option. Options are in
alphabetical order whatever the order of the request, so that order changes nothing. A yes/no question has the options
No and Yes; a score has the numbers of its levels, in their order.

The answer is one of the options as the assistant's turn. A question's prior is its mean score after the content-free
states of NULL_STATES.
"""

import json

NULL_STATES = ("N/A", "[MASK]", "")  # Zhao et al. 2021
TASK = "Answer the question about the text with one of its options."
UNASKED = "Which of the options fits the text?"  # where a question has options and no instructions
SCALAR = str | int | float | bool | None


def content_text(content: str | dict | list | None) -> str:
    """A state, an instruction or a description as text.

    A flat object becomes "Key: value, Key: value", as rows of a label task are written; other JSON stays compact JSON.
    Error: ValueError for what is no Unicode text, or nests too deep.
    """
    if content is None or isinstance(content, str):
        text = (content or "").strip()
    elif isinstance(content, dict) and all(isinstance(value, SCALAR) for value in content.values()):
        text = ", ".join(f"{key}: {scalar_text(value)}" for key, value in content.items())
    else:
        try:
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) if content else ""
        except RecursionError:
            raise ValueError("expected JSON of fewer levels") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected Unicode text without lone surrogates") from None
    return text


def scalar_text(value: SCALAR) -> str:
    """A JSON scalar as a row of a label task writes it: N/A for null."""
    if value is None:
        return "N/A"
    return value if isinstance(value, str) else json.dumps(value)


def question_text(instructions: str, options: list[tuple[str, str]]) -> str:
    """What stands after the state. options: (option, description or "") in the order in which they are shown."""
    if any(description for _, description in options):
        listed = [f"- {name}: {description}" if description else f"- {name}" for name, description in options]
        return "\n".join([instructions or UNASKED, "Options:", *listed])
    return f"{instructions or UNASKED}\nOptions: {', '.join(name for name, _ in options)}"


def decision_prompt(state: str, question: str) -> str:
    """The user message. question: of `question_text`."""
    return f"{TASK}\n\n{state}\n\n{question}"
