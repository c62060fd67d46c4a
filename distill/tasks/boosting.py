"""Gradient boosting on the fields of texts: the reference in an evaluation, the teacher in KD."""

from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import OrdinalEncoder

from common import SEED, Task, holdout, label_classes, unit_hash
from distill.files import UserError
from distill.tasks.creditmix import parse_fields
from distill.tasks.label_rows import balance, read_label_rows


class GradientBoosting:
    """Histogram gradient boosting on the fields of texts, words as categories. labels: the order of the classes."""

    def __init__(self, labels: tuple, seed: int = SEED):
        self.labels, self.seed = list(labels), seed

    def fit(self, texts: list[str], answers: list[str]) -> "GradientBoosting":
        fields = [parse_fields(t) for t in texts]
        self.words = sorted({k for f in fields for k, v in f.items() if isinstance(v, str)})
        self.numbers = sorted({k for f in fields for k in f}.difference(self.words))
        # a category that training did not have counts as missing; the trees take at most 255 of them
        unseen = {"handle_unknown": "use_encoded_value", "unknown_value": np.nan}
        self.encoder = OrdinalEncoder(**unseen, max_categories=250).fit(self.word_values(fields))
        self.trees = HistGradientBoostingClassifier(
            learning_rate=0.05,
            max_iter=60,
            max_leaf_nodes=8,
            min_samples_leaf=min(100, len(texts) // 50 + 1),  # a customer's months are near copies: no small leaves
            categorical_features=range(len(self.words)),
            early_stopping=False,
            random_state=self.seed,
        ).fit(self.encode(fields), [self.labels.index(a) for a in answers])
        return self

    def word_values(self, fields):
        return np.array([["", *(str(f.get(k)) for k in self.words)] for f in fields], dtype=object)

    def encode(self, fields):
        """[N, words + numbers] floats."""
        numbers = [[v if isinstance(v := f.get(k), float) else np.nan for k in self.numbers] for f in fields]
        return np.hstack([self.encoder.transform(self.word_values(fields))[:, 1:], np.array(numbers)])

    def predict_proba(self, texts: list[str]) -> np.ndarray:
        """Probabilities [N, L] in the order of the labels; 0 for a label that training did not have."""
        probs = np.zeros((len(texts), len(self.labels)))
        probs[:, self.trees.classes_] = self.trees.predict_proba(self.encode([parse_fields(t) for t in texts]))
        return probs


def boost(train: list[dict], labels: tuple, seed: int = SEED) -> GradientBoosting:
    """Gradient boosting fitted on rows with "question" and "answer"."""
    return GradientBoosting(labels, seed).fit([r["question"] for r in train], [r["answer"] for r in train])


def out_of_fold(rows: list[dict], labels: tuple, seed: int = SEED, folds: int = 5) -> np.ndarray:
    """Class probabilities [N, L] of rows, each from gradient boosting that saw no row of the same customer.

    Errors: UserError when the texts have no fields, or a class has one customer only.
    """
    label_of = {r["group"]: r["answer"] for r in rows}
    customers = Counter(label_of.values())
    if min(customers[label] for label in labels) < 2:
        raise UserError(f"gradient boosting out of fold needs 2 customers of each class, got {dict(customers)}")
    order = sorted(label_of, key=lambda g: (label_of[g], unit_hash(f"fold:{seed}", g)))  # every class in every fold
    fold_of = {g: i % folds for i, g in enumerate(order)}
    fold = np.array([fold_of[r["group"]] for r in rows])
    probs = np.zeros((len(rows), len(labels)))
    for k in set(fold_of.values()):
        model = boost([r for r in rows if fold_of[r["group"]] != k], labels, seed)
        probs[fold == k] = model.predict_proba([r["question"] for r in rows if fold_of[r["group"]] == k])
    return probs


def check_file(path: str | Path, columns: str, seed: int, val_frac: float, task: Task) -> None:
    """Print what gradient boosting reaches on a file's own split: three seeds, at most 1,500 held-out rows a class."""
    rows = [r for r in read_label_rows(path, task, columns)[0] if r["answer"]]
    figures = []
    for s in range(seed, seed + 3):
        train, held = holdout(rows, s, val_frac)
        train = balance(f"{path}: training side", train, task.labels, s)
        smallest = min(Counter(r["answer"] for r in held).values(), default=0)
        held = balance(f"{path}: held-out side", held, task.labels, s, min(1500, smallest))
        truth = label_classes(path, held, "answer", task)
        guess = boost(train, task.labels, s).predict_proba([r["question"] for r in held]).argmax(1)
        figures.append([accuracy_score(truth, guess), f1_score(truth, guess, average="macro")])
        print("{}: seed {}, {} rows: accuracy {:.3f}, macro-F1 {:.3f}".format(path, s, len(held), *figures[-1]))
    print("{}: mean of 3 seeds: accuracy {:.3f}, macro-F1 {:.3f}".format(path, *np.mean(figures, 0)))
