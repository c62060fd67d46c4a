"""What questions about one text cost, and how much the order of the shown options moves an answer.

    python tests/bench_decisions.py                        CPU or GPU, the embedded student with runs/smollm2_sft
    python tests/bench_decisions.py --base runs/random-3b --rounds 20

The aim: ten questions cost at most 2.5 times one question. One and ten alternate in one run, so the ratio holds on a
machine whose speed drifts. The prompt shows the options in alphabetical order. To say what that order does, every order
of three options is scored here, as a server without the sorting would.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.special import softmax
from serving import ROOT, Server, rows

sys.path.insert(0, str(ROOT))
from common import LabelScorer, load_model
from distill.files import cli
from distill.model.hub import EMBEDDED
from distill.serve.decision_prompt import NULL_STATES, decision_prompt, question_text
from distill.serve.description import CREDITMIX_ROW

LETTER = (
    "Dear Sir or Madam, my name is Ada Miller and I have been a customer of your bank since 2009. In March I was "
    "charged twice for the yearly fee of my account, 49.90 each time, on the 3rd and on the 5th. I called your "
    "hotline on the 10th and was told that the second payment would be refunded within a week. It was not. I wrote "
    "two letters, on the 21st of March and on the 4th of April, and never got an answer. In the meantime my balance"
    " fell below zero, since my salary arrived late, and you charged 12.50 for the overdraft, which would not have "
    "happened without your mistake. I expect that you refund the fee and the 12.50 by the end of this month. I also"
    " want to know why my letters were not answered. If I do not hear from you I will close both of my accounts and"
    " turn to the ombudsman. You can reach me by telephone after five in the evening. Yours faithfully, Ada Miller"
)
YES_NO = ("Does it name an amount of money?", "Is a deadline named?", "Does the person sound content?", "Is it urgent?")
CHOICES = {
    "Who should answer?": ("Billing", "Cards", "Lending"),
    "What is it about?": ("A fee", "A loan", "Something else"),
    "How does the person sound?": ("Angry", "Calm", "Friendly"),
}
SCORES = {
    "How long is it?": ("short", "medium", "long"),
    "How large is the amount?": ("small", "medium", "large"),
    "How hard is it to answer?": ("easy", "hard"),
}


def main(args):
    env = {"PRECISION": args.precision} if args.precision else {}
    with tempfile.TemporaryDirectory() as home, Server(home, BASE_MODEL=args.base, DEADLINE=600, **env) as server:
        first = ask(server, CREDITMIX_ROW, questions())[0]
        cost(server, "a CreditMix row", CREDITMIX_ROW, args.rounds)
        cost(server, "a letter", LETTER, args.rounds)
        print(f"ten questions about the row for the first time, with their priors: {1000 * first:.0f} ms")
    order(args.base, args.precision or "auto", args.adapter)


def questions():
    """Ten questions of the three types."""
    asked = [{"type": "noul", "instructions": text} for text in YES_NO]
    asked += [
        {"type": "choice", "instructions": q, "criteria": dict.fromkeys(options)} for q, options in CHOICES.items()
    ]
    asked += [{"type": "score", "instructions": q, "criteria": list(levels)} for q, levels in SCORES.items()]
    return {str(i): question for i, question in enumerate(asked)}


def cost(server, name, text, rounds):
    """Print the time of ten questions, of one and of /infer, asked in turns."""
    ten = questions()
    ones = [{key: question} for key, question in ten.items()]
    for asked in (ten, *ones):
        ask(server, text, asked)
    times = {"ten": [], "one": [], "infer": []}
    for i in range(rounds):
        seconds, tokens = ask(server, text, ten)
        times["ten"].append(seconds)
        times["one"].append(ask(server, text, ones[i % len(ones)])[0])
        started = time.perf_counter()
        assert server.infer("base", text)[0] == 200
        times["infer"].append(time.perf_counter() - started)
    ms = {kind: 1000 * np.median(own) for kind, own in times.items()}
    print(
        f"{name}, {tokens} tokens with ten questions: one {ms['one']:.0f} ms, ten {ms['ten']:.0f} ms, "
        f"{ms['ten'] / ms['one']:.2f}x; /infer {ms['infer']:.0f} ms"
    )


def ask(server, text, asked):
    """(seconds, tokens read) of one request."""
    body = {"model": "base", "state": text, "questions": asked}
    started = time.perf_counter()
    status, got, _ = server.request("POST", "/v1/systemone", body, timeout=600)
    assert status == 200, got
    return time.perf_counter() - started, got["usage"]["input_tokens"]


def order(base, precision, adapter):
    """Print how far the probabilities of three options move with the order in which the prompt shows them."""
    for name in (base, *([adapter] if Path(adapter, "adapter_config.json").is_file() else [])):
        model, tokenizer = load_model(name, precision)
        moved, other, count = [], 0, 0
        for question, options in CHOICES.items():
            scorer = LabelScorer(model, tokenizer, options)
            states = [LETTER, *rows(5)]
            found = []
            for shown in itertools.permutations(options):
                text = question_text(question, [(option, "") for option in shown])
                raw = scorer.score([decision_prompt(state, text) for state in (*states, *NULL_STATES)])
                found.append(softmax(raw[: len(states)] - raw[len(states) :].mean(0), axis=1))
            found = np.array(found)  # [orders, states, options]
            moved.append(np.abs(found - found[0]).max(2)[1:])
            other += int((found.argmax(2) != found[0].argmax(1)).sum())
            count += found[1:, :, 0].size
        moved = np.concatenate(moved)
        print(
            f"{name}: another order of the options moves a probability by {moved.mean():.3f} in the mean, at most "
            f"{moved.max():.3f}, and changes {other} of {count} choices ({len(CHOICES)} questions, {len(states)} texts)"
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default=EMBEDDED, help=f"base model (default: {EMBEDDED})")
    p.add_argument(
        "--adapter", default=str(ROOT / "runs" / "smollm2_sft"), help="also in another order (runs/smollm2_sft)"
    )
    p.add_argument("--precision", help="of the base model (default: auto)")
    p.add_argument("--rounds", type=int, default=5, help="of one and ten questions (default: 5)")
    cli(main, p)
