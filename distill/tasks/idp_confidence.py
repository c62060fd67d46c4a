"""How sure a model is of each value of its JSON: the probability of the value's tokens, from one more forward pass.

    confidences(model, tokenizer, table, extraction.pieces, extraction.value)  # one per leaf, in the order of leaves_of

The finished JSON is read once more after its prompt (teacher forcing), so generation is as it is without confidences.
A value's confidence is the joint probability of its tokens: that of writing exactly this value, given the document and
the fields before it (Malinin and Gales 2021, arXiv 2002.07650). A mean per token would hide the one wrong digit of a
long number, and a value with one wrong token is wrong.

It is the model's own probability, without the schema's mask. Renormalised under the mask, a token that the schema or
the token budget forces has probability 1 however unlikely the model found it (compare Park et al. 2024, arXiv
2405.21047), and a model that knows nothing of the document would look sure.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
from llguidance import LLTokenizer

from common import prompt_ids
from distill.model.log_probs import completion_log_probs
from distill.tasks.idp_leaves import Leaf, leaves_of
from distill.tasks.idp_schema import compact


def confidences(model, tokenizer, table: LLTokenizer, pieces: Sequence[tuple[str, object]], value) -> list[float]:
    """The confidence of each leaf of a document's value, from 0 to 1.

    pieces: the user message and the JSON of each piece of the document. A value that was merged from several takes its
    leaves' confidences from the pieces that they come from: of equal ones in a field, the first to the first.
    """
    if len(pieces) == 1:
        return leaf_probabilities(model, tokenizer, table, *pieces[0])
    known = defaultdict(deque)
    for message, answer in pieces:
        probabilities = leaf_probabilities(model, tokenizer, table, message, answer)
        for leaf, probability in zip(leaves_of(answer), probabilities, strict=True):
            known[leaf.field, compact(leaf.value)].append(probability)
    return [known[leaf.field, compact(leaf.value)].popleft() for leaf in leaves_of(value)]


def leaf_probabilities(model, tokenizer, table: LLTokenizer, message: str, answer: object) -> list[float]:
    """The joint probability of each leaf's tokens in compact(answer), as written after a user message."""
    (prompt,) = prompt_ids(tokenizer, [message])
    tokens = table.tokenize_bytes(compact(answer).encode())
    log_probs = completion_log_probs(model, prompt, [*tokens, table.eos_token])
    ends = np.cumsum([len(table.decode_bytes([token])) for token in tokens])
    return [float(np.exp(log_probs[tokens_of(leaf, ends)].sum())) for leaf in leaves_of(answer)]


def tokens_of(leaf: Leaf, ends: np.ndarray) -> slice:
    """The tokens that write a leaf. ends [T]: the byte after each token; one more token ends the answer.

    A token that the leaf shares with its surroundings counts: whether a value or null comes, and where a text ends, are
    decided in such tokens. A number ends in the token after it: without that, 1 would be at least as sure as 12.
    """
    first = int(np.searchsorted(ends, leaf.start, "right"))
    last = int(np.searchsorted(ends, leaf.end, "left"))
    number = isinstance(leaf.value, int | float) and not isinstance(leaf.value, bool)
    return slice(first, last + 1 + (number and ends[last] == leaf.end))
