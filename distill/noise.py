"""Swap noise: training rows whose fields are now and then those of another row with the same answer.

Rows of one customer are near copies, so a model that remembers rows names the labels of customers it has seen and
little else: trained without noise the embedded student names 82 % of its training labels and 63 % of other customers'.
With values exchanged among the rows of a label (random feature corruption, SCARF, arXiv 2106.15147, here within a
label) no customer comes back, while every field keeps its distribution given the label. What is lost is how fields go
together, and scores become too sure; the calibration, fitted on rows without noise, takes the second back.
"""

import random

from common import UserError
from distill.fields import split_fields


def swap_noise(rows, key, answer, task, share, passes, seed):
    """`passes` copies of the rows, a field's value in them with probability `share` that of a row of the same label.

    rows: dicts whose [key] is a prompt of `task` around 'Key: value, Key: value' and whose [answer] is its label.
    -> rows with another [key] each, the rest as it was; the same for the same seed.
    Errors: UserError without a label task, or naming the first text that has no fields.
    """
    if not task:
        raise UserError("--swap_noise: expected a label task; these rows have no task file")
    head, tail = task.template.split("{input}")
    rng, fields, values = random.Random(seed), [], {}
    for row in rows:
        text = row[key][len(head) : len(row[key]) - len(tail)]
        fields.append(split_fields(text))
        if task.prompt(", ".join(f"{name}: {value}" for name, value in fields[-1])) != row[key]:
            raise UserError(f"--swap_noise: expected texts like 'Key: value, Key: value', got {text[:60]!r}")
        for name, value in fields[-1]:
            values.setdefault((row[answer], name), []).append(value)
    noisy = []
    for _ in range(passes):
        for row, own in zip(rows, fields, strict=True):
            drawn = [
                (name, rng.choice(values[row[answer], name]) if rng.random() < share else value) for name, value in own
            ]
            noisy.append({**row, key: task.prompt(", ".join(f"{name}: {value}" for name, value in drawn))})
    return noisy
