"""What a label model has to beat: the majority class, and a classical classifier trained on the same rows."""

import sys
from collections import Counter

import numpy as np

from common import Task
from distill.files import UserError
from distill.tasks.boosting import boost
from distill.tasks.creditmix import split_fields
from distill.tasks.tfidf import tfidf_regression


def has_fields(rows: list[dict]) -> bool:
    """Whether there are rows, and all texts are 'Key: value, Key: value', which gradient boosting can read."""
    return bool(rows) and all(split_fields(r["question"]) for r in rows)


def references(train: list[dict], trained_on: list[dict], held: list[dict], task: Task) -> dict:
    """{name: scores [N, L] of the held-out rows}; None for one that does not apply, no entry without a label to learn.

    The majority class is that of `train`, the labelled training side. The classical classifier learns from the rows
    that the models were trained on: gradient boosting on the fields of a text, or TF-IDF with logistic regression
    where the text has none.
    """
    if not train:
        print("no references: no training row has a label", file=sys.stderr)
        return {}
    most = Counter(r["answer"] for r in train)
    prior = np.array([max(most[label], 0.5) / len(train) for label in task.labels])
    found = {"majority": np.log(np.tile(prior, (len(held), 1))), "gradient_boosting": None}
    texts = [r["question"] for r in held]
    try:
        p = boost(trained_on, task.labels).predict_proba(texts)
        found["gradient_boosting"] = np.log(np.clip(p, 1e-9, 1))
    except UserError as e:
        print(f"no gradient boosting reference: {e}", file=sys.stderr)
        p = tfidf_regression(trained_on, task.labels, texts)
        found["tfidf_logistic_regression"] = np.log(np.clip(p, 1e-9, 1))
    return found
