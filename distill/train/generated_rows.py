"""Rows for a label task that has none: an endpoint writes the inputs, which are filtered and balanced by label.

    requests   for one label each: some examples, and ten inputs wanted (Self-Instruct, arXiv 2212.10560; a label in the
               request, ZeroGen, arXiv 2202.07922). Replies are stored as they arrive, in NAME_kd.teacher/
    filter     no text twice, none close to another one, to an example or to a row to evaluate on (near_duplicates.py)
    balance    as many for one label as for another; what is missing is asked for again, up to a limit

Labels do not come from here: the teacher answers the rows like any others, and may say otherwise than was asked for.
All but the replies is computed again from them, so a stopped run goes on where it was.
"""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import Task, prompt_ids
from distill.files import (
    UserError,
    printable,
    read_json,
    sha256,
    write_json,
    write_jsonl,
)
from distill.tasks.label_rows import read_texts
from distill.tasks.near_duplicates import first_similar
from distill.train.teacher_answers import StoredAnswers
from distill.train.teacher_apis import Chat, input_text, instructions, well_formed
from distill.train.teacher_endpoint import Endpoint, announce_cost, ask_endpoint, usage_of
from distill.train.teachers import Teacher, cache_folder, require_single_process

PER_REQUEST = 10  # inputs asked for at once
SHOWN = 6  # examples in a request
LEAST_EXAMPLES = 5
LIMIT = 3  # times as many requests as would do if every input were new and good


class Writer(Chat):
    """A chat whose replies vary, unlike those of a teacher that labels."""

    def body(self, prompt: str) -> dict:
        return super().body(prompt) | {"temperature": 1.0}


@dataclass(frozen=True)
class Description:
    """What inputs are wanted: of which task, like which examples, and unlike which texts to evaluate on."""

    task: Task
    examples: list[str]
    excluded: list[str]

    def request(self, label: str, number: int, seed: int) -> str:
        """The message that asks for PER_REQUEST inputs of one label; each number shows other examples."""
        shown = random.Random(f"{seed}:{label}:{number}").sample(self.examples, min(SHOWN, len(self.examples)))
        listed = "\n".join(json.dumps(text, ensure_ascii=False) for text in shown)
        return (
            f"An instruction, whose input is left out:\n\n{instructions(self.task)}\n\n"
            f"Possible answers: {', '.join(self.task.labels)}\n\nExamples of inputs:\n{listed}\n\n"
            f"Write {PER_REQUEST} new inputs to which the right answer is {label}. They have the form of the examples "
            "and do not say what the answer is. Vary content, wording and length, and let some be hard to tell from "
            f"inputs with another answer. This is request {number + 1}: write what the others would not have.\n"
            f"Reply with a JSON list of {PER_REQUEST} strings and nothing else."
        )


def read_description(
    endpoint: Endpoint | None, task_path: Path | None, examples: Path | None, excluded: list[str]
) -> Description:
    """From the task file, a file of examples and files to evaluate on: rows of the task, with or without labels.

    Errors: UserError where something is missing, and for an endpoint that cannot be asked.
    """
    if endpoint is None:
        raise UserError("--generate: expected --teacher http://host/v1, which writes the inputs")
    if task_path is None:
        raise UserError("--generate: expected a label task (--task), which says what the inputs are for")
    if examples is None:
        raise UserError(f"--generate: expected --examples, a file with at least {LEAST_EXAMPLES} inputs")
    task = Task.load(task_path)
    endpoint.check(task)
    texts = list(dict.fromkeys(read_texts(examples, task)[1]))
    if len(texts) < LEAST_EXAMPLES:
        raise UserError(f"{examples}: {len(texts)} different examples; expected at least {LEAST_EXAMPLES}")
    return Description(task, texts, [text for path in excluded for text in read_texts(path, task)[1]])


def generate_data(
    endpoint: Endpoint,
    wanted: int,
    description: Description,
    tokenizer,
    *,
    data: Path,
    max_len: int,
    seed: int,
    yes: bool,
) -> dict:
    """Write `data`, KD rows {"input", "asked_label"} without an answer, unless an earlier run did; its record.

    wanted: rows in all, rounded up to a multiple of the labels. Prompts have less than max_len tokens. yes: do not ask
    whether the inputs are good.
    Errors: UserError for a file that was not generated so, for a request that fails for good, and for a limit of cost.
    """
    record_path = data.with_name(f"{data.stem}.generated.json")
    if data.exists():
        record = read_json(record_path) if record_path.is_file() else {}
        if record.get("wanted") != wanted:
            made = f"generated with --generate {record['wanted']}" if record else "not generated"
            raise UserError(f"{data}: exists, and was {made}; expected another --data")
        print(f"{data}: generated before, nothing is asked")
        return record
    require_single_process(Teacher(endpoint.url))
    limits = {"folder": cache_folder(data), "max_len": max_len, "seed": seed}
    rows, record = generate_rows(endpoint, wanted, description, tokenizer, **limits)
    if not rows:
        raise UserError(f"{record['replies']}: no input can be used: {record['dropped']}")
    print("some of them, with the label that was asked for:")
    for row in random.Random(seed).sample(rows, min(10, len(rows))):
        text = printable(input_text(description.task, row["input"]))
        print(f"  {row['asked_label']}: {' '.join(text.split())[:200]}")
    if not yes:
        confirm(record["replies"])
    write_json(record_path, record)
    write_jsonl(data, rows)
    return record


def confirm(kept: str) -> None:
    """Go on only if the user says so; UserError otherwise. kept: where everything is stored."""
    if not sys.stdin.isatty():
        raise UserError(f"{kept}: no terminal to ask whether these inputs are good; expected --yes after a look")
    if input("have them labelled, and train on them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(f"{kept}: kept, and not used; other --examples, or another --task, begin anew")


def generate_rows(
    endpoint: Endpoint, wanted: int, description: Description, tokenizer, *, folder: Path, max_len: int, seed: int
) -> tuple[list[dict], dict]:
    """(rows balanced by label, their record): requests until there are enough inputs, or until LIMIT."""
    task = description.task
    target = -(-wanted // len(task.labels))
    most = LIMIT * -(-target // PER_REQUEST)
    longest = max(map(len, prompt_ids(tokenizer, description.examples)))
    writer = Writer(endpoint.model, None, min(4096, 64 + 2 * PER_REQUEST * longest))
    first = [description.request(label, 0, seed) for label in task.labels]
    settings = [endpoint.url, endpoint.model, writer.max_tokens, description.examples, first]
    replies = StoredAnswers(folder / f"inputs-{sha256(json.dumps(settings))[:16]}.jsonl")
    asked, prompts, announced = Counter(), {}, False
    while True:
        # What the replies hold so far, and how many requests are missing for each label.
        texts = [(label, text) for prompt, label in prompts.items() for text in texts_in(replies.of[prompt].text)]
        rows, dropped = usable_rows(texts, description, target, tokenizer, max_len)
        found = Counter(row["asked_label"] for row in rows)
        missing = {la: min(-(-(target - found[la]) // PER_REQUEST), most - asked[la]) for la in task.labels}
        if not any(missing.values()):
            break
        for label in task.labels:
            for number in range(asked[label], asked[label] + missing[label]):
                prompts[description.request(label, number, seed)] = label
        asked.update(missing)

        # They are asked, those without a reply from an earlier run; before the first of them the cost is said.
        todo = [prompt for prompt in prompts if prompt not in replies.of]
        if todo:
            tokens = dict(zip(todo, map(len, prompt_ids(tokenizer, todo)), strict=True))
            _, spent = usage(endpoint, replies, prompts, tokenizer, writer)
            announce_cost(endpoint, tokens, writer.max_tokens, spent or 0.0)
            if not announced:
                announce_labels(endpoint, target * len(task.labels), description, tokenizer, max_len)
            announced = True
            ask_endpoint(endpoint, writer, tokens, replies.keep, spent or 0.0)
    empty = sum(not texts_in(replies.of[prompt].text) for prompt in prompts)
    dropped = {"replies without a list of inputs": empty, **dropped}
    counts = {label: found[label] for label in task.labels}
    print(f"{len(rows)} new inputs from {len(prompts)} replies in {replies.path}: {counts}")
    print("not used: " + (", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "none"))
    if min(counts.values()) < target:
        print(f"fewer than {target} for some label, after {LIMIT} times as many requests as would do")
    used, cost = usage(endpoint, replies, prompts, tokenizer, writer)
    return rows, {
        "wanted": wanted,
        "rows": counts,
        "requests": len(prompts),
        "dropped": dropped,
        "replies": str(replies.path),
        "input_tokens": used[0],
        "output_tokens": used[1],
        "cost": cost,
    }


def usage(endpoint: Endpoint, replies: StoredAnswers, prompts, tokenizer, writer: Writer) -> tuple[tuple, float | None]:
    """((input tokens, output tokens), cost) of the replies to `prompts`."""
    there = [prompt for prompt in prompts if prompt in replies.of]
    tokens = dict(zip(there, map(len, prompt_ids(tokenizer, there)), strict=True))
    used = usage_of(replies.of, tokens, writer.max_tokens)
    return used, endpoint.cost(*used)


def announce_labels(endpoint: Endpoint, rows: int, description: Description, tokenizer, max_len: int) -> None:
    """Print what it will take to have the rows labelled afterwards, if they are as long as the examples."""
    prompts = [description.task.prompt(text) for text in description.examples]
    sent = rows * sum(map(len, prompt_ids(tokenizer, prompts))) // len(prompts)
    received = rows * endpoint.protocol(description.task, max_len).max_tokens
    cost = endpoint.cost(sent, received)
    line = f"to label {rows} rows afterwards: about {sent} tokens in and at most {received} out"
    print(line + ("" if cost is None else f"; at most about {cost:.4g}"))


def texts_in(reply: str) -> list[str]:
    """The texts that a reply lists: the strings of a JSON list, whole or cut, else lines with numbers or bullets."""
    _, bracket, listed = reply.partition("[")
    if not bracket:
        return [line.strip() for line in re.findall(r"^\s*(?:\d+[.):]|[-*•])\s+(.+)$", reply, flags=re.MULTILINE)]
    found = []
    for string, colon in re.findall(r'("(?:[^"\\]|\\.)*")(\s*:)?', listed, flags=re.DOTALL):
        if colon:  # the key of an object
            continue
        try:
            found.append(well_formed(json.loads(string, strict=False)).strip())
        except ValueError:  # an escape that JSON does not have
            continue
    return found


def usable_rows(
    texts: list[tuple[str, str]], description: Description, target: int, tokenizer, max_len: int
) -> tuple[list[dict], dict[str, int]]:
    """(rows of the first `target` texts of each label that are new, {reason: texts dropped}). texts: (label, text)."""
    task, excluded = description.task, len(description.excluded)
    filled = [pair for pair in texts if pair[1]]
    lengths = map(len, prompt_ids(tokenizer, [task.prompt(text) for _, text in filled]))
    short = [pair for pair, n in zip(filled, lengths, strict=True) if n < max_len]
    similar = first_similar([text for _, text in short], [*description.excluded, *description.examples])
    dropped = {
        "empty": len(texts) - len(filled),
        f"longer than {max_len} tokens": len(filled) - len(short),
        "like a row to evaluate on": sum(place is not None and place < excluded for place in similar),
        "like an example or another input": sum(place is not None and place >= excluded for place in similar),
    }
    rows, taken = [], Counter()
    for (label, text), place in zip(short, similar, strict=True):
        if place is None and taken[label] < target:
            taken[label] += 1
            rows.append({"input": task.prompt(text), "asked_label": label})
    return rows, dropped


def agreement(rows: list[dict]) -> dict:
    """What the teacher said of generated rows: {"labels": its mix, "as_asked": share with the label asked for}."""
    own = [r for r in rows if "asked_label" in r]
    mix = Counter(r["teacher_output"] for r in own)
    same = sum(r["teacher_output"] == r["asked_label"] for r in own) / len(own)
    print(f"labels of the teacher: {dict(mix)}; {same:.0%} of them are the label that was asked for")
    return {"labels": dict(mix), "as_asked": same}
