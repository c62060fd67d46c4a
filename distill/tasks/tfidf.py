"""TF-IDF with logistic regression: the reference for label tasks of free text."""

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def tfidf_regression(train: list[dict], labels: tuple, texts: list[str]) -> np.ndarray:
    """Class probabilities [N, L] of texts, learned from rows with "question" and "answer"; 0 for a label without rows.

    Words and pairs of words, lower case. C=10 and sublinear counts are the usual choice for short texts.
    """
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"),
        LogisticRegression(C=10, max_iter=1000),
    )
    model.fit([r["question"] for r in train], [labels.index(r["answer"]) for r in train])
    probs = np.zeros((len(texts), len(labels)))
    probs[:, model.classes_] = model.predict_proba(texts)
    return probs
