"""The proof that an exported model answers as before: prompt bytes, merged weights, GGUF files in a real llama.cpp.

What is compared is what the export changes. The adapter in fp32 is the truth; the merged folder is read back as it
lies on disk, in 16 bits, and computed in fp32, since bf16 arithmetic alone moves a score by up to 0.2 and would hide
both sides' differences (embedded student: 0.03 from rounding the weights, 0.17 to 0.29 with bf16 arithmetic).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common import Calibration, LabelScorer, Task, label_trie, prompt_ids
from distill.export.gguf_file import BITS
from distill.export.llama_cpp import LlamaCpp
from distill.model.chat_template import chat_text, escape_special_tokens
from distill.model.generate import generate
from distill.tasks.idp_schema import parse_valid, validator

Gaps = list[list[dict[int, float]]]  # by text and step: how many nats a token lies below the best one

TEXTS = 10  # prompts whose bytes and greedy text are compared
DOCUMENTS = 3  # answers under a JSON Schema
# (share of rows with the same label, mean difference of a probability) that a GGUF file must reach
LABEL_BARS = {"f16": (0.99, 0.01), "bf16": (0.99, 0.01), "q8_0": (0.99, 0.01)}
LABEL_BARS |= dict.fromkeys(("q5_1", "q5_0", "q4_1", "q4_0"), (0.95, 0.04))
NEAREST = 40  # rows, of those with the nearest labels, on which a file of 16 bits is scored: it must lose none
NEAR = 16  # tokens of a step that are remembered
TIE = 0.05  # nats between two tokens, or two labels, within which rounding may swap them
PROBES = (  # beside the rows: what pre-tokenizers cut differently
    "a  1 12 x=  345",
    "\n\n\tdef f(x):\n    return 3.14*x  # don't",
    "é ü 漢字 🙂 ½ \u00a0end  ",
    " 2026-11-28T09:05 ",
)


class ProofFailed(Exception):
    """A check of the export did not reach its bar; the message is one line."""


@dataclass
class Proof:
    """The checks so far, each printed as it is made: {name: {"passed": bool or None, "found": text, ...}}."""

    checks: dict[str, dict] = field(default_factory=dict)

    def record(self, name: str, passed: bool | None, found: str, **figures) -> None:
        """passed: None where it could not be checked. Raises ProofFailed where it is False."""
        self.checks[name] = {"passed": passed, "found": found, **figures}
        print(f"{'not checked' if passed is None else 'ok' if passed else 'FAILED'}: {name}: {found}", flush=True)
        if passed is False:
            raise ProofFailed(f"{name}: {found}")


@dataclass
class Answers:
    """What a model says to the rows of the proof.

    scores: float [N, L] label scores of all rows, prior [L]; both None for free text.
    texts: greedy token ids after the first TEXTS prompts; gaps: of the likeliest tokens at each step.
    """

    texts: list[list[int]]
    gaps: Gaps
    scores: np.ndarray | None = None
    prior: np.ndarray | None = None


def answers_of(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    task: Task | None,
    max_new_tokens: int,
    rows: int | None = None,
) -> Answers:
    """Answers of a model to user messages; rows: of how many the labels are scored (default: all)."""
    texts, gaps = greedy(model, tokenizer, prompts[:TEXTS], max_new_tokens)
    if task is None:
        return Answers(texts, gaps)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    return Answers(texts, gaps, scorer.score(prompts[:rows]), scorer.prior(task))


def greedy(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> tuple[list[list[int]], Gaps]:
    """(token ids, gaps) of each prompt, greedy and up to the end of the turn; gaps: see Answers."""
    ids = prompt_ids(tokenizer, prompts)
    replies = [reply for (reply,) in generate(model, tokenizer, ids, max_new_tokens)]
    gaps = [near_tokens(model, prompt, reply.tokens) for prompt, reply in zip(ids, replies, strict=True)]
    return [reply.tokens + [tokenizer.eos_token_id] * reply.ended for reply in replies], gaps


@torch.inference_mode()
def near_tokens(model: torch.nn.Module, prompt: list[int], text: list[int]) -> list[dict[int, float]]:
    """At each token of a text and after it: {token: nats below the best one} of the NEAR likeliest tokens."""
    ids = torch.tensor([prompt + text], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(text) + 1, use_cache=False).logits[0].float()
    best, tokens = logits.topk(NEAR)
    below = (best[:, :1] - best).tolist()
    return [dict(zip(*step, strict=True)) for step in zip(tokens.tolist(), below, strict=True)]


def compare_texts(
    ours: list[list[int]], theirs: list[list[int]], gaps: Gaps, tie: float
) -> tuple[int, int, str | None]:
    """(equal, ties, first difference or None) of greedy texts: lists of token id lists; gaps: see Answers.

    Where two texts part at a tie, what follows is another text and says nothing.
    """
    equal = ties = 0
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        at = next((k for k, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
        if mine == other:
            equal += 1
        elif at < min(len(mine), len(other)) and gaps[i][at].get(other[at], tie + 1) <= tie:
            ties += 1
        else:
            return equal, ties, f"prompt {i + 1} parts at token {at + 1}"
    return equal, ties, None


def compare_labels(ours: np.ndarray, theirs: np.ndarray, calibration: Calibration, prior: np.ndarray) -> dict:
    """Differences of two sets of label scores [N, L], after calibration but for the first two.

    {"rows", "score_max", "same_label": share, "same_but_ties": share where a swap of two labels that lie within TIE
    for us counts as the same, "probability_mean"}.
    """
    from scipy.special import softmax

    mine, other = calibration(ours, prior), calibration(theirs, prior)
    same = mine.argmax(1) == other.argmax(1)
    lost = mine.max(1) - np.take_along_axis(mine, other.argmax(1)[:, None], 1)[:, 0]
    return {
        "rows": len(ours),
        "score_max": float(abs(ours - theirs).max()),
        "same_label": float(same.mean()),
        "same_but_ties": float((same | (lost <= TIE)).mean()),
        "probability_mean": float(abs(softmax(mine, axis=1) - softmax(other, axis=1)).mean()),
    }


def check_merge(proof: Proof, adapter: Answers, merged: Answers, calibration: Calibration | None) -> None:
    """The merged model in fp32 against the adapter in fp32: the arithmetic of merging, nothing rounded yet."""
    equal, ties, wrong = compare_texts(adapter.texts, merged.texts, adapter.gaps, 0.01)
    found, passed, figures = wrong or f"greedy text equal on {equal + ties} of {equal + ties} prompts", not wrong, {}
    if merged.scores is not None:
        theirs = merged.scores[: len(adapter.scores)]
        figures = compare_labels(adapter.scores, theirs, calibration, adapter.prior)
        found += f", label scores to {figures['score_max']:.1e}"
        passed = passed and figures["score_max"] <= 1e-2
    proof.record("merged against adapter, fp32", passed, found, **figures)


def check_rounded(proof: Proof, merged: Answers, folder: Answers, calibration: Calibration | None) -> None:
    """The merged folder as it lies on disk, in 16 bits, against the merged model before it was rounded."""
    if folder.scores is None:
        equal, ties, wrong = compare_texts(merged.texts, folder.texts, merged.gaps, 0.2)
        found = wrong or f"greedy text of {equal} prompts equal, of {ties} up to a near tie"
        return proof.record("merged folder in 16 bits", not wrong, found)
    figures = compare_labels(merged.scores, folder.scores, calibration, merged.prior)
    passed = figures["score_max"] <= 0.2 and figures["same_but_ties"] >= 0.99
    proof.record("merged folder in 16 bits", passed, shown(figures), **figures)


def shown(figures: dict) -> str:
    swaps = f" ({figures['same_label']:.1%} with swaps at ties)" * (figures["same_label"] < figures["same_but_ties"])
    return (
        f"same label on {figures['same_but_ties']:.1%} of {figures['rows']} rows{swaps}, a score moves by up to "
        f"{figures['score_max']:.3f}, a probability by {figures['probability_mean']:.4f} in the mean"
    )


def bars(kind: str) -> str:
    same, difference = LABEL_BARS[kind]
    return f"{kind} must keep {same:.0%} of the labels and move a probability by {difference} at most in the mean"


def check_prompts(
    proof: Proof, engine: LlamaCpp, tokenizer: PreTrainedTokenizerBase, prompts: list[str], name: str
) -> None:
    """llama.cpp's rendering of the chat template, byte by byte, and its token ids, against ours."""
    rows = [*prompts[:TEXTS], *PROBES]
    for i, (prompt, ids) in enumerate(zip(rows, prompt_ids(tokenizer, rows), strict=True), 1):
        ours, theirs = chat_text(tokenizer, prompt), engine.render(escape_special_tokens(tokenizer, prompt))
        if ours.encode() != theirs.encode():
            proof.record(f"{name}: prompt bytes", False, f"prompt {i}: {theirs[-80:]!r}; expected {ours[-80:]!r}")
        if engine.tokens(theirs) != ids:
            proof.record(f"{name}: prompt bytes", False, f"prompt {i}: other token ids for {prompt[-80:]!r}")
    proof.record(f"{name}: prompt bytes", True, f"{len(rows)} prompts, bytes and token ids equal")


def check_text(
    proof: Proof,
    engine: LlamaCpp,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    ours: Answers,
    name: str,
) -> None:
    """llama.cpp's greedy text against the merged folder's, for a file of 16 bits. ours: Answers."""
    ids = prompt_ids(tokenizer, prompts[:TEXTS])
    theirs = [engine.generate(row, len(text)) for row, text in zip(ids, ours.texts, strict=True)]
    equal, ties, wrong = compare_texts(ours.texts, theirs, ours.gaps, TIE)
    proof.record(f"{name}: greedy text", not wrong, wrong or f"equal on {equal} prompts, to a rounding tie on {ties}")


def label_parity(
    engine: LlamaCpp,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    ours: Answers,
    task: Task,
    calibration: Calibration,
    kind: str,
) -> tuple[bool, dict]:
    """(whether llama.cpp's label scores reach the bars of `kind`, figures). ours: Answers of the merged folder.

    Rows come in the order of our margin between the two best labels, and the first ones that make a pass impossible
    end it: a file that fails fails early. A file of 16 bits is scored on the NEAREST of them.
    """
    same, difference = LABEL_BARS[kind]
    ids, trie = prompt_ids(tokenizer, prompts), label_trie(tokenizer, task.labels)
    best = np.sort(calibration(ours.scores, ours.prior), 1)
    order, theirs = np.argsort(best[:, -1] - best[:, -2])[: NEAREST if BITS[kind] == 16 else None], []
    for n, row in enumerate(order, 1):
        theirs.append(engine.label_scores(ids[row], trie))
        figures = compare_labels(ours.scores[order[:n]], np.array(theirs), calibration, ours.prior)
        lost, moved = (1 - figures["same_but_ties"]) * n, figures["probability_mean"] * n
        if lost > (1 - same) * len(order) + 1e-6 or moved > difference * len(order):
            return False, figures
    return True, figures


def check_json(
    proof: Proof, engine: LlamaCpp, prompts: list[str], schema: dict, max_new_tokens: int, name: str
) -> None:
    """llama.cpp's answers under a JSON Schema, judged by the validator that judges our own."""
    judge, valid, cut = validator(schema), 0, 0
    for i, prompt in enumerate(prompts[:DOCUMENTS], 1):
        text, ended = engine.json(prompt, schema, max_new_tokens)
        _, wrong = parse_valid(text, judge)
        if ended and wrong:
            proof.record(f"{name}: JSON under the schema", False, f"prompt {i}: {wrong}")
        valid, cut = valid + (wrong is None), cut + (not ended and wrong is not None)
    found = f"{valid} of {valid + cut} answers valid" + f", {cut} cut at {max_new_tokens} tokens" * bool(cut)
    proof.record(f"{name}: JSON under the schema", valid > 0 or None, found)
