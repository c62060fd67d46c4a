"""Python code from a request: direct or plan first, checked against tests in the sandbox where there are some.

    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write a function that sorts a list." > sort.py
    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write top(words, k): the k most frequent words." \
        --tests test_top.py --n 5 --plan_then_code
    python infer_codegen.py --model_dir smollm2-135m --prompt "Write add(a, b)." --max_new_tokens 40       # CPU
    python infer_codegen.py --model_dir runs/codegen_sft --data requests.jsonl --out code.jsonl --n 10  # batches
    python infer_codegen.py --endpoint http://127.0.0.1:8080/v1 --prompt "Write add(a, b)."    # llama.cpp, Ollama, vLLM

Only code goes to standard output, the rest (plan, sandbox, verdicts) to standard error; --json shows whole replies.
Each row of --out repeats its row of --data, with its id and whatever else it holds, and adds the sample.
Exit code 1: no reply holds code, or --tests were given and no sample passes them.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from common import load_model
from distill.files import UserError, cli, printable, read_text, write_jsonl
from distill.tasks.codegen_reply import Screen, TokenStream, only_code
from distill.tasks.codegen_samples import Sampling, add_sampling_arguments, sample, sample_to_file
from distill.tasks.codegen_sandbox import add_isolation_argument, require_isolation, run_many
from distill.tasks.codegen_tasks import parse_tests, program, read_tasks
from distill.tasks.endpoint import Endpoint

OWN = ("sample", "plan", "code", "tokens", "seconds", "error", "verdict")  # what a sample adds to its row


def main(args):
    check_arguments(args)
    prompt = read_text("-") if args.prompt == "-" else args.prompt
    sampling = Sampling.of(args, args.plan_then_code)
    tests = parse_tests(read_text(args.tests), args.tests) if args.tests else None
    tasks = read_tasks(args.data) if args.data else []
    for task in tasks:
        if task.get("tests"):
            parse_tests(task["tests"], f"{args.data}: task {task['task_id']}")
    if tests is not None or any(t.get("tests") for t in tasks):
        print(require_isolation(args.require_isolation), file=sys.stderr)
    if args.endpoint:
        model, tokenizer = Endpoint(args.endpoint, args.endpoint_model), None
        name = f"{model.url} {model.model}"
    else:
        name, (model, tokenizer) = args.model_dir, load_model(args.model_dir, args.precision)
        if not (Path(name) / "adapter_config.json").is_file():
            print(f"warning: {name}: no adapter: code that it writes may run and still be wrong", file=sys.stderr)
    if args.data and str(args.out) == "-":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.jsonl"
            write_batch(model, tokenizer, name, tasks, sampling, path)
            sys.stdout.write(path.read_text(encoding="utf-8"))
    elif args.data:
        write_batch(model, tokenizer, name, tasks, sampling, args.out)
        print(f"samples in {args.out}", file=sys.stderr)
    else:
        answer(model, tokenizer, prompt, sampling, tests, args.json)


def check_arguments(args):
    """Errors: UserError for arguments that contradict each other, before a model is loaded."""
    if (args.prompt is None) == (args.data is None) or (args.data is None) != (args.out is None):
        raise UserError("expected --prompt TEXT, or --data FILE with --out FILE")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; expected a request")
    if args.data and args.tests:
        raise UserError("--tests belongs to --prompt; expected a field 'tests' in the rows of --data")


# ---------------------------------------------------------------------------------------------------------------------
# One prompt


def answer(model, tokenizer, prompt: str, sampling: Sampling, tests: str | None, as_json: bool) -> None:
    """Print all samples for one prompt, or with tests the first that passes; exit code 1 when none does."""
    stream = tokenizer is not None and sys.stdout.isatty() and sampling.n == 1 and tests is None and not as_json
    screen = Screen()
    streams = {}
    if stream:
        streams = {
            "plan_stream": TokenStream(tokenizer, screen.plan),
            "reply_stream": TokenStream(tokenizer, screen.reply),
        }
    kinds, empty = Counter(), 0
    for start in range(0, sampling.n, sampling.batch_size):
        numbers = list(range(start, min(start + sampling.batch_size, sampling.n)))
        rows = sample(model, tokenizer, [prompt] * len(numbers), numbers, sampling, **streams)
        verdicts = run_many([(row["code"], tests) for row in rows]) if tests is not None else [None] * len(rows)
        for k, row, verdict in zip(numbers, rows, verdicts, strict=True):
            title = f"# sample {k + 1} of {sampling.n}\n" * (sampling.n > 1 and tests is None)
            if verdict:
                kinds[verdict["kind"]] += 1
                print(f"sample {k + 1}: {verdict['kind']} {verdict['detail']}".strip(), file=sys.stderr)
                if verdict["kind"] == "passed":
                    return show(row, prompt, title, verdict, as_json)
                continue
            row["code"] = only_code(row["reply"])
            empty += not row["code"].strip()
            if not stream:
                show(row, prompt, title, verdict, as_json)
            elif not screen.shown and row["code"]:
                print(printable(row["code"]))
    if tests is not None:
        print(f"no sample passes the tests: {dict(kinds)}", file=sys.stderr)
        sys.exit(1)
    if empty:
        advice = "; expected a larger --max_new_tokens or another --seed (--json shows the reply)"
        print(f"no code in {empty} of {sampling.n} replies{advice}", file=sys.stderr)
    if empty == sampling.n:
        sys.exit(1)


def show(row: dict, prompt: str, title: str, verdict: dict | None, as_json: bool) -> None:
    """Print one sample: code (or JSON) to standard output, the plan to standard error."""
    if as_json:
        fields = {name: row[name] for name in ("plan", "code", "reply", "tokens", "seconds")}
        print(json.dumps({"prompt": prompt, **fields, **({"verdict": verdict} if verdict else {})}))
        return
    if row["plan"]:
        print(f"plan:\n{printable(row['plan'])}\n", file=sys.stderr)
    if row["code"]:
        print(title + (printable(row["code"]) if sys.stdout.isatty() else row["code"]), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Many prompts


def write_batch(model, tokenizer, name: str, tasks: list[dict], sampling: Sampling, out: Path) -> None:
    """Write samples for all tasks, checked in the sandbox where a task has tests, to `out` (JSONL, by rename)."""
    part = out.with_name(out.name + ".part")
    rows = sample_to_file(model, tokenizer, name, [t["prompt"] for t in tasks], part, sampling, "samples")
    checked = [row for row in rows if "code" in row and tasks[row["index"]].get("tests")]
    verdicts = run_many([(program(tasks[r["index"]], r["code"]), tasks[r["index"]]["tests"]) for r in checked])
    for row, verdict in zip(checked, verdicts, strict=True):
        row["verdict"] = verdict
    lines = []
    for row in rows:
        task = {k: v for k, v in tasks[row["index"]].items() if k not in OWN}
        lines.append(task | {k: v for k, v in row.items() if k in OWN})
    write_jsonl(out, lines)
    part.unlink()
    errors = sum("error" in row for row in rows)
    print(f"{len(rows)} samples for {len(tasks)} prompts; over the context: {errors}", file=sys.stderr)
    if checked:
        print(f"verdicts: {dict(Counter(row['verdict']['kind'] for row in checked))}", file=sys.stderr)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--model_dir", help="adapter folder, model folder, hub id or smollm2-135m")
    where.add_argument("--endpoint", help="http://host:port/v1 of llama.cpp, Ollama or vLLM in place of a model here")
    p.add_argument("--endpoint_model", help="the model's name there (default: the first that the server lists)")
    p.add_argument("--prompt", help="the request, or - for standard input")
    p.add_argument(
        "--plan_then_code", action="store_true", help="a plan first, then code that follows it; twice the calls"
    )
    p.add_argument(
        "--tests", type=Path, help="file of asserts; prints the first sample that passes them in the sandbox"
    )
    p.add_argument("--json", action="store_true", help="one line per sample: plan, code, reply, tokens, seconds")
    p.add_argument("--data", "--input", type=Path, help="JSONL of prompts (and tests) or -, instead of --prompt")
    p.add_argument("--out", "--output", type=Path, help="JSONL of samples, - to print; a stopped run continues it")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    add_sampling_arguments(p)
    add_isolation_argument(p)
    cli(main, p)
