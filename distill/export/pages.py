"""What lies beside the weights for people: Ollama's Modelfile, the commands, the model card."""

from transformers import PreTrainedTokenizerBase

from distill.model.chat_template import render


def go_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template as Ollama's Go template, or None where it does not build a conversation turn by turn.

    It is cut out of what the tokenizer renders, so that a single user message comes out byte by byte as in training.
    """
    system, user, answer, again = "@system@", "@user@", "@answer@", "@again@"
    turns = [("user", user), ("assistant", answer), ("user", again)]

    try:
        one, two, three = (render(tokenizer, turns[:n], False) for n in (1, 2, 3))
        opened = render(tokenizer, turns[:1], True)
        with_system = render(tokenizer, [("system", system), *turns[:1]], False)
    except Exception:  # a template refuses a message in whatever way it likes
        return None
    pieces = {"assistant": two.removeprefix(one), "user": three.removeprefix(two)}
    first = pieces["user"].replace(again, user)
    pieces["system"], default = with_system.removesuffix(first), one.removesuffix(first)
    grows = two.startswith(one) and three.startswith(two) and opened.startswith(one) and one.endswith(first)
    whole = all(pieces[role].count(text) == 1 for role, text in (("assistant", answer), ("user", again)))
    if not (grows and whole and pieces["system"].count(system) == 1) or any("{{" in t for t in (three, with_system)):
        return None
    branches = [
        f'{word} eq .Role "{role}" }}}}{pieces[role].replace(text, "{{ .Content }}")}'
        for word, role, text in (
            ("{{ if", "system", system),
            ("{{ else if", "user", again),
            ("{{ else if", "assistant", answer),
        )
    ]
    begin = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{default}{{{{ end }}}}' if default else ""
    return f"{begin}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{opened.removeprefix(one)}"


def modelfile(
    tokenizer: PreTrainedTokenizerBase, gguf: str, ends: list[str], exact: bool, instruction: list[str]
) -> str:
    """Text of an Ollama Modelfile.

    gguf: name of the file beside it; ends: texts that end a turn; exact: whether answers are labels or JSON, which are
    not sampled; instruction: lines for a comment.
    """
    lines = [f"FROM ./{gguf}"]
    template = go_template(tokenizer)
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# The chat template is not one of plain turns: Ollama takes the one inside the GGUF file.")
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    lines += ["PARAMETER temperature 0"] * exact
    return "\n".join([*lines, *(f"# {line}".rstrip() for line in instruction), ""])


def card(record: dict, name: str) -> str:
    """The model card (README.md) of an export; record: what export.json holds."""
    lines = [
        "---",
        f"base_model: {record['base']['name']}",
        "---",
        f"# {name}",
        "",
        f"`{record['model_dir']}` merged into `{record['base']['name']}` ({record['dtype']}) by Distill-SLM.",
        "",
        "| file | bytes |",
        "| --- | --- |",
        *(f"| `{file}` | {size:,} |" for file, size in record["sizes"].items()),
        "",
        f"Checked when it was made, on {record['rows']['count']} prompts ({record['rows']['source']}):",
        "",
        *(
            f"- {'not checked: ' if check['passed'] is None else ''}{check_name}: {check['found']}"
            for check_name, check in record["checks"].items()
        ),
        "",
        "Use it:",
        "",
        *(f"    {command}" for command in record["commands"].values()),
        "",
        "The prompt is the instruction and the input, as the Modelfile's comment shows them. Text from outside that "
        "contains special tokens should lose them first: engines read them as the end of a turn.",
        "",
    ]
    return "\n".join(lines)
