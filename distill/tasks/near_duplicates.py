"""Texts that say nearly the same: cosine similarity of character n-grams weighted by TF-IDF."""

import re
from collections.abc import Sequence

import numpy as np

SIMILAR = 0.8  # from here on two texts count as the same
BLOCK = 512  # texts whose similarities are computed at once


def first_similar(texts: Sequence[str], known: Sequence[str] = (), threshold: float = SIMILAR) -> list[int | None]:
    """For each text, the place in [*known, *texts] of the first one before it that it resembles; None if it is new.

    Only known texts and new ones are compared with. n-grams have 3 to 5 characters, within words, without case and
    punctuation. What all texts share (the field names of a form, for example) weighs little, so they are compared by
    what is their own.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not texts:
        return []
    everything, first = [*known, *texts], len(known)
    vectorizer = TfidfVectorizer(preprocessor=words, analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    vectors = vectorizer.fit_transform(everything)
    new, found = np.arange(len(everything)) < first, []
    for start in range(first, len(everything), BLOCK):
        similar = (vectors[start : start + BLOCK] @ vectors.T).tocsr()
        for i in range(similar.shape[0]):
            row = slice(similar.indptr[i], similar.indptr[i + 1])
            places = similar.indices[row][similar.data[row] >= threshold]
            places = places[(places < start + i) & new[places]]
            found.append(int(places.min()) if len(places) else None)
            new[start + i] = found[-1] is None
    return found


def words(text: str) -> str:
    """The words of a text, lower case; a text without any (an emoji) as it is."""
    return " ".join(re.findall(r"\w+", text.lower())) or text
