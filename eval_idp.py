"""Evaluate extraction models on the same held-out documents, constrained and not: one table, report.json, a picture.

    python eval_idp.py --model_dir smollm2-135m runs/idp_sft runs/idp_kd --data receipts.jsonl \
        --schema data/sroie_schema.json --val_frac 0.5

On a CPU, a few minutes:

    python eval_idp.py --model_dir smollm2-135m --data data/idp_corpus.jsonl --schema data/idp_schema.json --limit 4

Held out are the companies that idp_prepare.py kept apart (same file, seed and fraction). Values are compared by
`canonical`: amounts and dates by value, text by its letters and digits in lower case. A field counts once for every
value, so the items of a list are compared as a multiset, field by field. The report shows how far the confidence of a
value (idp_confidence.py) tells right values from wrong ones; a null counts as right where the gold states nothing.
"""

import argparse
import shlex
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import SEED, holdout, load_model
from distill.evaluate import (
    bootstrap,
    bootstrap_mean,
    check_overlap,
    confidence_figures,
    coverage_at_error,
    interval,
    overlap_lines,
    overlap_record,
    precision_recall_f1,
    ratio,
)
from distill.files import UserError, check_output_folder, cli, positive, read_json, write_json, write_jsonl
from distill.model.generate import context_length
from distill.model.hub import check_models
from distill.report import confidence_table, draw_confidence
from distill.run_record import run_record
from distill.tasks.idp_confidence import confidences
from distill.tasks.idp_corpus import read_corpus
from distill.tasks.idp_decode import Constraint, Vocabulary, generate_texts
from distill.tasks.idp_documents import extract, idp_prompt, pieces_of, schema_warning
from distill.tasks.idp_grounding import details
from distill.tasks.idp_leaves import leaves_of
from distill.tasks.idp_schema import check_schema, compact, parse_valid, validator
from distill.tasks.idp_score import (
    SROIE_FIELDS,
    canonical,
    edit_similarity,
    field_counts,
    free_value,
    leaves,
    regex_receipt,
    right_leaves,
)

EXAMPLE = "data/receipt_example.txt"

# ---------------------------------------------------------------------------------------------------------------------
# Figures


def summarise(results: list[dict], gold: list, groups: list[str]) -> dict:
    """Validity, exact match, scores by field and their macro and micro means, each with a 95 % interval over groups.

    results: one dict per document with "value" (None where the answer is not JSON) and "valid".
    """
    counts = [field_counts(r["value"], g) for r, g in zip(results, gold, strict=True)]
    stated = Counter(p for g in gold for p, v in leaves(g) if canonical(v) is not None)
    paths = list(stated)  # a field that no gold states has no recall
    table = np.array([[c.get(p, [0, 0, 0]) for p in paths] for c in counts], float)  # documents, fields, 3
    scores, drawn = precision_recall_f1(table.sum(0)), bootstrap(precision_recall_f1, table, groups)
    similar = similarities(results, gold, paths)
    fields = {}
    for i, p in enumerate(paths):
        fields[p] = {"n": stated[p]}
        for k, value, values in zip(("precision", "recall", "f1"), scores, drawn, strict=True):
            fields[p] |= {k: round(float(value[i]), 4), f"{k}_ci95": rounded_interval(values[:, i])}
        if p in similar:
            fields[p]["edit_similarity"] = round(float(ratio(similar[p].sum(0))), 4)
            fields[p]["edit_similarity_ci95"] = rounded_interval(bootstrap(ratio, similar[p], groups))
    valid = [r["valid"] for r in results]
    exact = [r["valid"] and all(a == p == g for a, p, g in c.values()) for r, c in zip(results, counts, strict=True)]
    return {
        "n": len(gold),
        "valid": with_interval(np.mean(valid), bootstrap_mean(valid, groups)),
        "exact_match": with_interval(np.mean(exact), bootstrap_mean(exact, groups)),
        "macro_f1": with_interval(scores[2].mean(), drawn[2].mean(1)),
        "micro_f1": with_interval(micro_f1(table.sum(0)), bootstrap(micro_f1, table, groups)),
        "fields": fields,
    }


def similarities(results: list[dict], gold: list, paths: list[str]) -> dict[str, np.ndarray]:
    """{path: [documents, 2]}: the summed edit similarity and the number of gold texts, for fields that hold text."""
    found = {p: np.zeros((len(gold), 2)) for p in paths if "[]" not in p}
    for i, (r, g) in enumerate(zip(results, gold, strict=True)):
        have = dict(leaves(r["value"]))
        for p, v in leaves(g):
            if p in found and isinstance(v, str) and (canonical(v) or " ")[0] == "text":
                found[p][i] += edit_similarity(str(have.get(p) or ""), v), 1
    return {p: sums for p, sums in found.items() if sums.any()}


def micro_f1(counts: np.ndarray) -> np.ndarray:
    """F1 of the counts [..., fields, 3] summed over fields."""
    return precision_recall_f1(counts.sum(-2))[2]


def rounded_interval(values: np.ndarray) -> list[float]:
    return [round(v, 4) for v in interval(values)]


def with_interval(value: float, drawn: np.ndarray) -> dict:
    return {"value": round(float(value), 4), "ci95": rounded_interval(drawn)}


# ---------------------------------------------------------------------------------------------------------------------
# Confidence

ALL, DOCUMENT = "all values", "whole document"  # rows of the table after the fields


def judge_confidence(results: list[dict], gold: list) -> dict[str, np.ndarray]:
    """{field: float array [values, 3] of confidence, right (0 or 1), grounded (0, 1, NaN: unknown)} of the results.

    After the fields come ALL, and DOCUMENT: a document's least confidence, and whether all of it is right.
    """
    fields, documents = {}, []
    for r, g in zip(results, gold, strict=True):
        found = leaves_of(r["value"]) if r["details"] else []
        for leaf, told, right in zip(found, r["details"], right_leaves(found, g), strict=True):
            grounded = np.nan if told["grounded"] is None else told["grounded"]
            fields.setdefault(leaf.field, []).append((told["confidence"], right, grounded))
        if found:
            exact = all(a == p == n for a, p, n in field_counts(r["value"], g).values())
            documents.append((min(told["confidence"] for told in r["details"]), exact, np.nan))
    if documents:
        fields |= {ALL: [row for rows in fields.values() for row in rows], DOCUMENT: documents}
    return {field: np.array(rows, float) for field, rows in fields.items()}


def confidence_report(judged: dict[str, np.ndarray]) -> dict[str, dict]:
    """confidence_figures of each field, and what grounding adds.

    "grounded": {yes, no, unknown: {"n", "accuracy"}}. "coverage_at_5_percent_error_grounded": the coverage where a
    value that is not grounded counts as one of confidence 0.
    """
    report = {}
    for field, (confidence, right, grounded) in ((f, rows.T) for f, rows in judged.items()):
        m = report[field] = confidence_figures(confidence, right > 0)
        p, y = (confidence * (grounded != 0))[:, None], (right == 0).astype(int)
        m["coverage_at_5_percent_error_grounded"] = coverage_at_error(p, y, 0.05)
        parts = {"yes": grounded == 1, "no": grounded == 0, "unknown": np.isnan(grounded)}
        m["grounded"] = {
            k: {"n": int(own.sum()), "accuracy": float(right[own].mean())} for k, own in parts.items() if own.any()
        }
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def run_model(
    name: str, rows: list[dict], schema, grammar: str, precision: str, max_new_tokens: int, batch_size: int, place: str
) -> dict[str, list[dict]]:
    """{mode: results} of one model: constrained, and what the same model writes without a constraint.

    place: what an error calls the rows' file.
    """
    model, tokenizer = load_model(name, precision)
    vocab = Vocabulary.of(tokenizer, model.config.get_text_config().vocab_size)
    constraint = Constraint.of(grammar, vocab, max_new_tokens)
    judge, context = validator(schema), context_length(model)
    documents, label = [row["document"] for row in rows], Path(name).name
    for i, document in enumerate(documents, 1):
        if len(pieces_of(document, schema, tokenizer, context, max_new_tokens)) > 1:
            raise UserError(f"{place}: held-out row {i} exceeds the context of {name}; expected shorter ones")
    found = extract(model, tokenizer, documents, schema, constraint, max_new_tokens, batch_size, desc=label)
    texts = generate_texts(
        model,
        tokenizer,
        [idp_prompt(schema, d) for d in documents],
        max_new_tokens,
        batch_size=batch_size,
        desc=f"{label} free",
    )
    results = {"constrained": [], "free": []}
    for extraction, document, text in zip(tqdm(found, f"{label} confidence"), documents, texts, strict=True):
        value, leaves_found = extraction.value, []
        if isinstance(value, UserError):
            result = {"value": free_value(""), "valid": False, "text": str(value)}
        else:
            sure = confidences(model, tokenizer, vocab.table, extraction.pieces, value)
            result = {"value": value, "valid": judge.is_valid(value), "text": compact(value)}
            leaves_found = details(value, document, schema, sure)
        results["constrained"].append({**result, "details": leaves_found})
        valid = parse_valid(text, judge)[1] is None
        results["free"].append({"value": free_value(text), "valid": valid, "text": text})
    return results


def picture(report, path):
    """F1 by field with 95 % intervals, one bar a system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = {name: r for name, r in report["systems"].items() if not name.endswith(" free")}
    paths = list(next(iter(systems.values()))["fields"])
    fig, ax = plt.subplots(figsize=(1.5 + 1.3 * len(paths), 4), layout="constrained")
    width = 0.8 / len(systems)
    for k, (name, r) in enumerate(systems.items()):
        f1 = np.array([r["fields"][p]["f1"] for p in paths])
        low, high = np.array([r["fields"][p]["f1_ci95"] for p in paths]).T
        error = np.maximum([f1 - low, high - f1], 0)
        ax.bar(np.arange(len(paths)) + k * width, f1, width, yerr=error, capsize=2, label=name)
    ax.set_xticks(np.arange(len(paths)) + 0.4 - width / 2, paths, rotation=20)
    ax.set(ylim=(0, 1.02), ylabel="F1", title=f"{report['n']} held-out documents")
    ax.legend(fontsize="small")
    fig.savefig(path, dpi=120)


def table(report):
    lines = [f"{'system':34}{'valid':>7}{'exact':>7}  {'macro F1 (95 %)':22}{'micro F1':>9}"]
    for name, r in report["systems"].items():
        low, high = r["macro_f1"]["ci95"]
        macro = f"{r['macro_f1']['value']:.3f} ({low:.3f}-{high:.3f})"
        valid, exact, micro = (r[k]["value"] for k in ("valid", "exact_match", "micro_f1"))
        lines.append(f"{name[-34:]:34}{valid:7.3f}{exact:7.3f}  {macro:22}{micro:9.3f}")
        lines.append("    " + ", ".join(f"{p} {f['f1']:.3f}" for p, f in r["fields"].items()))
    return "\n".join(lines)


def main(args):
    out = args.out or Path("runs/reports") / datetime.now().strftime("idp-%Y%m%d-%H%M%S")
    check_output_folder("--out", out)
    schema = read_json(args.schema)
    grammar = check_schema(schema)
    _, rows = holdout(read_corpus(args.data, schema, args.group_field), args.seed, args.val_frac, args.val_start)
    rows = rows[: args.limit]
    if not rows:
        raise UserError(f"{args.data}: no held-out rows; expected more groups or a larger --val_frac")
    prompts = [idp_prompt(schema, r["document"]) for r in rows]
    check_models(args.model_dir)
    overlap = {name: check_overlap(name, [[p] for p in prompts], args.allow_overlap) for name in args.model_dir}
    gold, groups = [r["gold"] for r in rows], [r["group"] for r in rows]
    report = {"run": run_record(args), "n": len(rows), "groups": len(set(groups)), "training_overlap": overlap}
    report |= overlap_record(overlap)
    report["systems"] = {}
    if set(schema.get("properties", {})) == SROIE_FIELDS:
        values = [regex_receipt(r["document"]) for r in rows]
        report["systems"]["regular expressions"] = summarise(
            [{"value": v, "valid": True} for v in values], gold, groups
        )
    judged = {}
    for name in args.model_dir:
        if warning := schema_warning(name, schema):
            print(f"warning: {warning}", file=sys.stderr)
        start = time.perf_counter()
        found = run_model(
            name, rows, schema, grammar, args.precision, args.max_new_tokens, args.batch_size, str(args.data)
        )
        for mode, results in found.items():
            system = name if mode == "constrained" else f"{name} free"
            report["systems"][system] = summarise(results, gold, groups)
            if mode == "constrained":
                judged[name] = judge_confidence(results, gold)
                report["systems"][name]["confidence"] = confidence_report(judged[name])
            lines = [
                {"gold": g, **r, "fields": field_counts(r["value"], g)} for r, g in zip(results, gold, strict=True)
            ]
            write_jsonl(out / f"{Path(name).name}_{mode}.jsonl", lines)
        report["systems"][name]["seconds_both_modes"] = round(time.perf_counter() - start, 1)
    write_json(out / "report.json", report)
    picture(report, out / "f1_by_field.png")
    draw_confidence({name: tuple(j[ALL].T[:2]) for name, j in judged.items() if j}, out / "confidence.png")
    lines = [table(report), *overlap_lines(report)]
    for name in args.model_dir:
        if figures := report["systems"][name]["confidence"]:
            lines += ["", *confidence_table(name, figures, ALL)]
    print("\n".join(lines))
    print(f"{out}/report.json, f1_by_field.png, confidence.png and one JSONL per system")
    best = max(args.model_dir, key=lambda name: report["systems"][name]["macro_f1"]["value"])
    command = ["python", "infer_idp.py", "--model_dir", best, "--schema", args.schema, "--data", EXAMPLE, "--details"]
    print("next:", shlex.join(map(str, command)))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", nargs="+", required=True, help="adapter or model folders, hub ids or smollm2-135m")
    p.add_argument("--data", required=True, type=Path, help="the corpus that idp_prepare.py read")
    p.add_argument("--schema", required=True, type=Path, help="the JSON Schema that it was prepared with")
    p.add_argument("--out", "--out_dir", type=Path, help="folder of the report (default runs/reports/idp-<time>)")
    p.add_argument("--group_field", default="company", help="as given to idp_prepare.py (default company)")
    p.add_argument("--val_frac", type=float, default=0.33, help="share of the groups held out (default 0.33)")
    p.add_argument("--val_start", type=float, default=0.0, help="as given to idp_prepare.py (default 0)")
    p.add_argument("--seed", type=int, default=SEED, help=f"of the split (default {SEED})")
    p.add_argument("--limit", type=int, help="only the first n held-out documents (default: all)")
    p.add_argument("--max_new_tokens", type=int, default=512, help="tokens of one answer (default 512)")
    p.add_argument(
        "--batch_size", type=positive(int), default=8, help="documents at once (default 8): memory against time"
    )
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base models")
    p.add_argument(
        "--allow_overlap", action="store_true", help="evaluate on trained documents all the same, and say so"
    )
    cli(main, p)
