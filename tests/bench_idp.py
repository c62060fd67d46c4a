"""The constrained decoder on real JSON Schemas: how many it takes, whether its output is valid, and what it costs.

    python tests/bench_idp.py json_schemas.jsonl.gz                           rows {"schema": ...}; random logits
    python tests/bench_idp.py json_schemas.jsonl.gz --model_dir smollm2-135m  and the cost inside generate()

Random logits choose any token that the schema allows, so they reach what no model writes. Every accepted schema is
decoded at budgets from its minimum up. "Invalid" counts what the decoder wrote and infer_idp.py would not print
(parse_valid: JSON, numbers finite, the validator with formats): before it generates again, so the bar is 0.

All accepted schemas with the model (an hour of one CPU core; the model goes to a GPU where there is one):

    OMP_NUM_THREADS=1 nice -n 19 python tests/bench_idp.py json_schemas.jsonl.gz --model_dir smollm2-135m --every 1
"""

import argparse
import gzip
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import load_model, prompt_ids
from distill.files import ROOT, UserError, cli
from distill.model.generate import generate
from distill.model.hub import EMBEDDED, embedded_student
from distill.model.sampling import bit_masks, forbid, ranked_tokens
from distill.tasks.idp_decode import Constraint, DocumentDecoder, Vocabulary
from distill.tasks.idp_schema import check_schema, parse_valid, validator

BUDGETS = {"min": 0, "min+1": 1, "min+3": 3, "min+16": 16, "min+64": 64, "min+256": 256}
LONGEST = 256  # tokens that the model writes at most: a schema must leave min+16 below it
DOCUMENTS = ROOT / "data" / "idp_corpus.jsonl"  # whose beginnings the model is prompted with


def read_schemas(path):
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as f:
        return [json.loads(line)["schema"] for line in f]


def random_documents(constraint, rows, budget, rng, bias):
    """Texts that random logits (rows, vocabulary) write; half of the rows prefer the tokens that make structure."""
    decoders = [DocumentDecoder(constraint, budget) for _ in range(rows)]
    n_vocab = constraint.vocab.table.vocab_size
    for _ in range(budget):
        scores = torch.from_numpy(rng.standard_normal((rows, n_vocab), dtype=np.float32))
        scores[::2] += bias
        ranked = ranked_tokens(forbid(scores, torch.from_numpy(bit_masks(decoders))), 0.0, None)
        for decoder, best in zip(decoders, ranked, strict=True):
            decoder.choose(best)
        if all(decoder.done for decoder in decoders):
            break
    return [decoder.text for decoder in decoders]


def is_valid(judge, text):
    """Whether the product takes these bytes as they are; where not, it generates again, and here they count."""
    try:
        return parse_valid(text.decode(), judge)[1] is None
    except UnicodeDecodeError:
        return False


def bench_random(schemas, vocab, seed):
    """Random logits over every schema and budget: ([(number, constraint, judge)] accepted, invalid outputs)."""
    rng = np.random.default_rng(seed)
    tokens = [vocab.table.decode_bytes([t]) for t in range(vocab.table.vocab_size)]
    bias = torch.tensor([3.0 if re.fullmatch(rb'[\[\]{}":,0-9.\-]+|true|false|null', t) else 0.0 for t in tokens])
    refused, accepted, compile_s, outputs, invalid, shown = Counter(), [], [], Counter(), Counter(), []
    for i, schema in enumerate(tqdm(schemas, desc="random logits")):
        start = time.perf_counter()
        try:
            constraint = Constraint.of(check_schema(schema), vocab, budget=4096)
        except UserError as e:
            named = re.search(r"keyword '([^']+)'", str(e))
            refused[named[1] if named else str(e)[:60]] += 1
            continue
        compile_s.append(time.perf_counter() - start)
        judge = validator(schema)
        accepted.append((i, constraint, judge))
        for name, more in BUDGETS.items():
            for text in random_documents(constraint, 2, len(constraint.min_closing) + more, rng, bias):
                outputs[name] += 1
                if not is_valid(judge, text):
                    invalid[name] += 1
                    shown.append((i, name, text[-160:]))
    print(f"schemas {len(schemas)}, accepted {len(accepted)} ({len(accepted) / len(schemas):.1%})")
    print("refused by keyword:", ", ".join(f"{k} {n}" for k, n in refused.most_common()))
    p50, p99 = np.percentile(compile_s, [50, 99])
    print(f"check + compile + shortest document: p50 {p50:.4f} s, p99 {p99:.4f} s, max {max(compile_s):.4f} s")
    print(f"{'budget':10}{'outputs':>10}{'invalid':>10}")
    for name in BUDGETS:
        print(f"{name:10}{outputs[name]:>10}{invalid[name]:>10}")
    for i, name, text in shown:
        print(f"invalid: schema {i}, budget {name}: ...{text}")
    return accepted, sum(invalid.values())


def model_budgets(least):
    """The budgets of one batch, from the minimum up to about twice it."""
    return [least, least + 1, least + 4, least + 16, min(max(2 * least, 48), LONGEST)]


class TimedDecoder(DocumentDecoder):
    """Counts the seconds that mask and completion take."""

    spent = 0.0

    def allowed(self):
        start = time.perf_counter()
        mask = super().allowed()
        TimedDecoder.spent += time.perf_counter() - start
        return mask

    def choose(self, ranked):
        start = time.perf_counter()
        token = super().choose(ranked)
        TimedDecoder.spent += time.perf_counter() - start
        return token


def bench_generate(accepted, model, tokenizer, seed):
    """The model over schemas: validity, and the share of the time that mask and completion take; invalid outputs.

    The rows of a batch have other documents and other budgets; half of them are greedy, half sampled.
    """
    documents = [json.loads(line)["document"][:40] for line in DOCUMENTS.read_text("utf-8").splitlines()]
    rng = random.Random(seed)
    shares, outputs, invalid, tokens, seconds, too_long = [], 0, 0, 0, 0.0, []
    for i, constraint, judge in accepted:
        least = len(constraint.min_closing)
        if least + 16 > LONGEST:
            too_long.append(i)
            continue
        budgets = model_budgets(least)
        n, texts, start, TimedDecoder.spent = len(budgets), [], time.perf_counter(), 0.0
        for temperature in (0.0, 1.0):
            messages = [f"Answer in JSON.\n\n{d}" for d in rng.sample(documents, n)]
            replies = generate(
                model,
                tokenizer,
                prompt_ids(tokenizer, messages),
                budgets,
                processor=lambda k, constraint=constraint, budgets=budgets: TimedDecoder(constraint, budgets[k]),
                temperature=temperature,
                seed=seed + i,
            )
            texts += [constraint.vocab.table.decode_bytes(reply.tokens) for (reply,) in replies]
            tokens += sum(len(reply.tokens) for (reply,) in replies)
        took = time.perf_counter() - start
        wrong = [text for text in texts if not is_valid(judge, text)]
        shares.append(TimedDecoder.spent / took)
        outputs, invalid, seconds = outputs + 2 * n, invalid + len(wrong), seconds + took
        print(f"schema {i}: shortest {least} tokens, {outputs} outputs so far, {invalid} invalid, ", end="")
        print(f"mask + completion {shares[-1]:.1%} of {took:.1f} s", flush=True)
        for text in wrong:
            print(f"invalid: schema {i}: ...{text[-160:]}", flush=True)
    p50, p90 = np.percentile(shares, [50, 90])
    print(f"mask + completion, share of generation time, {n} rows, {len(shares)} schemas: ", end="")
    print(f"median {p50:.1%}, p90 {p90:.1%}, max {max(shares):.1%}; {tokens / seconds:.0f} tokens/s")
    print(f"schemas whose shortest document leaves no 16 of {LONGEST} tokens, not run: {too_long or 'none'}")
    print(f"{model.config.name_or_path} on {model.device}: outputs {outputs}, invalid {invalid}")
    return invalid


def main(args):
    torch.set_grad_enabled(False)
    schemas = read_schemas(args.schemas)[: args.limit]
    if args.model_dir:
        model, tokenizer = load_model(args.model_dir)
        n_vocab = model.config.vocab_size
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(embedded_student())
        n_vocab = len(tokenizer)
    accepted, invalid = bench_random(schemas, Vocabulary.of(tokenizer, n_vocab), args.seed)
    if args.model_dir:
        invalid += bench_generate(accepted[:: args.every], model, tokenizer, args.seed)
    sys.exit(1 if invalid else 0)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("schemas", help='JSONL or JSONL.gz with rows {"schema": ...}')
    p.add_argument("--model_dir", help=f"also run generate() with this model, for example {EMBEDDED} (default: none)")
    p.add_argument("--every", type=int, default=10, help="the model on every n-th accepted one (default 10: minutes)")
    p.add_argument("--limit", type=int, help="only the first n schemas (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of random logits, documents and sampling (default 0)")
    cli(main, p)
