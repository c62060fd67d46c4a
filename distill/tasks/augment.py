"""Swap noise: copies of training rows in which some fields are those of another row with the same label.

Rows of one customer are near copies of each other. Trained without noise, the embedded student names 82 % of its
training labels and 63 % of other customers': it has learnt customers by heart. In a noisy copy hardly a row comes back
whole, while every field keeps its distribution given the label. (SCARF, arXiv 2106.15147, corrupts features in this
way, drawing from all rows.) What is lost is how fields go together given the label, and the scores become too sure;
the calibration, fitted on rows without noise, takes the second back.
"""

import math
import random

from common import prompt_of
from distill.files import UserError, between
from distill.tasks.creditmix import split_fields


def swap_noise(rows, key, answer, task, share, passes, seed):
    """`passes` copies of the rows, a field's value in them with probability `share` that of a row of the same label.

    rows: dicts whose [key] is a prompt of `task` around 'Key: value, Key: value' and whose [answer] is its label.
    -> rows with another [key] each, the one before as "as_it_was", the rest unchanged; the same for the same seed.
    Errors: UserError without a label task, or naming the first text that has no fields.
    """
    if not task:
        raise UserError("--swap_noise: expected a label task; these rows have no task file")

    def written(pairs):
        return task.prompt(", ".join(f"{name}: {value}" for name, value in pairs))

    head, tail = task.template.split("{input}")
    rng, fields, values = random.Random(seed), [], {}
    for row in rows:
        text = row[key][len(head) : len(row[key]) - len(tail)]
        fields.append(split_fields(text))
        if written(fields[-1]) != row[key]:
            raise UserError(f"--swap_noise: expected texts like 'Key: value, Key: value', got {text[:60]!r}")
        for name, value in fields[-1]:
            values.setdefault((row[answer], name), []).append(value)
    noisy = []
    for _ in range(passes):
        for row, own in zip(rows, fields, strict=True):
            drawn = [
                (name, rng.choice(values[row[answer], name]) if rng.random() < share else value) for name, value in own
            ]
            noisy.append({**row, key: written(drawn), "as_it_was": row[key]})
    return noisy


def noisy_copies(args, rows, key, answer, task):
    """(rows, passes): with --swap_noise as many noisy copies of each row as the run makes passes, else the rows."""
    if not args.swap_noise:
        return rows, 1
    passes = math.ceil(args.max_steps * args.batch_size / len(rows) if args.max_steps else args.epochs)
    return swap_noise(rows, key, answer, task, args.swap_noise, passes, args.seed), passes


def prompts_of(rows):
    """The prompts of trained rows as they were before noise, each once: what an evaluation must not meet."""
    if not rows or "as_it_was" not in rows[0]:
        return [prompt_of(r) for r in rows]
    return list(dict.fromkeys(r["as_it_was"] for r in rows))


def add_noise_argument(p):
    p.add_argument(
        "--swap_noise",
        type=between(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="of the fields of a label task's rows that each copy takes from other rows of the label (default: 0)",
    )
