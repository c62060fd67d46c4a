"""The constrained decoder on real JSON Schemas: how many it takes, whether its output is valid, and what it costs.

    python tests/bench_idp.py json_schemas.jsonl.gz                           rows {"schema": ...}; random logits
    python tests/bench_idp.py json_schemas.jsonl.gz --model_dir smollm2-135m  and the cost inside generate()

Random logits choose any token that the schema allows, so they reach what no model writes. Every accepted schema is
decoded at budgets from its minimum up; "invalid" counts outputs that do not parse or do not pass the validator.
"""

import argparse
import gzip
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from jsonschema import Draft202012Validator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, cli, load_model, prompt_ids
from distill.embedded import EMBEDDED, embedded_student
from distill.idp_decode import Constraint, SchemaLogitsProcessor, Vocabulary, check_schema

BUDGETS = {"min": 0, "min+1": 1, "min+3": 3, "min+16": 16, "min+64": 64, "min+256": 256}


def read_schemas(path):
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as f:
        return [json.loads(line)["schema"] for line in f]


def random_documents(constraint, rows, budget, rng, bias):
    """Texts that random logits (rows, vocabulary) write; half of the rows prefer the tokens that make structure."""
    processor = SchemaLogitsProcessor(constraint, rows, budget)
    n_vocab = constraint.vocab.table.vocab_size
    ids = torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(budget):
        scores = torch.from_numpy(rng.standard_normal((rows, n_vocab), dtype=np.float32))
        scores[::2] += bias
        processor(ids, scores)
        if all(row.done for row in processor.rows):
            break
    return [row.text for row in processor.rows]


def is_valid(judge, text):
    try:
        return judge.is_valid(json.loads(text.decode()))
    except ValueError:
        return False


def bench_random(schemas, vocab, seed):
    """Random logits over every schema and budget: ([(constraint, validator)] of the accepted, invalid outputs)."""
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
        judge = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        accepted.append((constraint, judge))
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


def bench_generate(accepted, model, tokenizer, rows=4, budget=96):
    """Share of the generation time that mask and completion rule take, by schema; returns the invalid outputs."""
    prompt = prompt_ids(tokenizer, ["Write a JSON document."])[0]
    ids = torch.tensor([prompt] * rows, device=model.device)
    shares, invalid = [], 0
    for constraint, judge in tqdm(accepted, desc="generate"):
        processor = SchemaLogitsProcessor(constraint, rows, budget + len(constraint.min_closing))
        spent = []

        def timed(input_ids, scores, processor=processor, spent=spent):
            start = time.perf_counter()
            scores = processor(input_ids, scores)
            spent.append(time.perf_counter() - start)
            return scores

        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=budget + len(constraint.min_closing),
            do_sample=False,
            eos_token_id=constraint.vocab.table.eos_token,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[timed],
        )
        shares.append(sum(spent) / (time.perf_counter() - start))
        invalid += sum(not is_valid(judge, row.text) for row in processor.rows)
    p50, p90 = np.percentile(shares, [50, 90])
    print(f"mask + completion, share of generation time, {rows} rows, {len(shares)} schemas: ", end="")
    print(f"median {p50:.1%}, p90 {p90:.1%}, max {max(shares):.1%}; {model.config.name_or_path} on {model.device}")
    print(f"outputs of the model {rows * len(shares)}, invalid {invalid}")
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
        invalid += bench_generate(accepted[:: args.every], model, tokenizer)
    sys.exit(1 if invalid else 0)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("schemas", help='JSONL or JSONL.gz with rows {"schema": ...}')
    p.add_argument("--model_dir", help=f"also time generate() with this model, for example {EMBEDDED} (default: none)")
    p.add_argument("--every", type=int, default=10, help="time every n-th accepted schema (default 10: some minutes)")
    p.add_argument("--limit", type=int, help="only the first n schemas (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the random logits (default 0)")
    cli(main, p.parse_args())
