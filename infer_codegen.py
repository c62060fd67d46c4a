"""Python code from a request: direct or plan first, checked against tests in the sandbox where there are some.

    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write a function that sorts a list." > sort.py
    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write top(words, k): the k most frequent words." \
        --tests test_top.py --n 5 --plan_then_code
    python infer_codegen.py --model_dir smollm2-135m --prompt "Write add(a, b)." --max_new_tokens 40       # CPU
    python infer_codegen.py --model_dir runs/codegen_sft --input requests.jsonl --output code.jsonl --n 10  # batches

Only code goes to standard output, the rest (plan, sandbox, verdicts) to standard error; --json shows whole replies.
Exit code 1: no reply holds code, or --tests were given and no sample passes them.
"""

import argparse
import ast
import json
import sys
import time
from collections import Counter
from pathlib import Path

from common import (
    SEED,
    UserError,
    between,
    check_row,
    cli,
    load_model,
    prompt_ids,
    read_rows,
    read_text,
    sha256,
    write_jsonl,
)
from distill.codegen_reply import Screen, extract_code, only_code, streamer
from distill.models import adapter_sha256
from distill.tasks.codegen_sandbox import describe_isolation, run_many

PLAN_TOKENS = 160  # a plan is a few lines; what is longer rambles


def main(args):
    check_arguments(args)
    tests = parse_tests(read_text(args.tests), args.tests) if args.tests else None
    tasks = read_tasks(args.input) if args.input else [{"prompt": args.prompt}]
    for task in tasks:
        if task.get("tests"):
            parse_tests(task["tests"], f"{args.input}: task {task['task_id']}")
    if tests is not None or any(t.get("tests") for t in tasks):
        print(describe_isolation(), file=sys.stderr)
    model, tokenizer = load_model(args.model_dir)
    if args.input:
        return write_batch(model, tokenizer, tasks, args)
    return answer(model, tokenizer, args, tests)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and prompts: prepare, infer and eval build them here


def code_prompt(task, plan=None):
    """The user message that asks for code, conditioned on a plan where there is one."""
    if plan is None:
        return f"Write Python code for this task. Reply with one Python code block.\n\n{task}"
    ask = "Write Python code for this task, following the plan. Reply with one Python code block."
    return f"{ask}\n\n{task}\n\nPlan:\n{plan}"


def plan_prompt(task):
    """The user message that asks for a plan."""
    return f"Write a short numbered plan for this task. Do not write code.\n\n{task}"


def program(task, code):
    """What is executed for a sample. A stub (HumanEval) comes first: it brings imports and helpers, and ends in a
    docstring, so that both a function body and a whole function can follow."""
    stub = task.get("stub", "")
    return stub + code if code[:1].isspace() or not stub else f"{stub}\n\n{code}"


def read_tasks(path):
    """Tasks of a JSON or JSONL file: [{"task_id", "prompt", "tests"?, "solution"?, "plan"?}].

    Forms: {"prompt", "tests"?, "solution"?, "plan"?} with tests as text or as a list of asserts, or MBPP's
    {"text" (or "prompt"), "code", "test_list", "test_setup_code"?, "test_imports"?}, whose request quotes the tests as
    is usual for MBPP, since the text does not name the function. Errors: UserError naming file and row.
    """
    tasks = []
    for i, row in enumerate(read_rows(path, {}), 1):
        place = f"{path}: row {i}"
        if "text" in row or "test_list" in row:
            request = "text" if "text" in row else "prompt"  # the sanitized MBPP says prompt
            optional = {"code": str, "test_setup_code": str, "test_imports": list}
            check_row(place, row, {request: str, "test_list": list}, optional)
            asserts = "\n".join(map(str, row["test_list"]))
            if not asserts.strip():
                raise UserError(f"{place}: field 'test_list' is empty; expected asserts")
            setup = [row.get("test_setup_code") or "", *map(str, row.get("test_imports") or [])]
            task = {
                "prompt": f"{row[request].strip()}\nYour code should pass these tests:\n{asserts}",
                "tests": "\n".join([*setup, asserts]),
                "solution": (row.get("code") or "").replace("\r\n", "\n"),
            }
        else:
            check_row(place, row, {"prompt": str}, {"tests": (str, list), "solution": str, "plan": str})
            tests = row.get("tests") or ""
            tests = tests if isinstance(tests, str) else "\n".join(map(str, tests))
            task = {**row, "tests": tests if tests.strip() else ""}
        tasks.append({"task_id": str(row.get("task_id", i)), **{k: v for k, v in task.items() if k != "task_id"}})
    return tasks


def parse_tests(text, place):
    """Text of asserts, run only in the sandbox; UserError where it is no Python or nothing in it can fail."""
    try:
        tree = ast.parse(text)
        compile(tree, str(place), "exec")  # finds a `return` outside a function, too
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = f":{e.lineno}" if isinstance(e, SyntaxError) else ""
        raise UserError(f"{place}{line}: tests: expected Python with asserts: {getattr(e, 'msg', e)}") from None
    runs, left = [], list(tree.body)
    while left:
        node = left.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            runs.append(node)
            left += ast.iter_child_nodes(node)
    checks = (ast.Assert, ast.Raise)
    can_fail = any(isinstance(n, checks) or getattr(n, "attr", "").startswith("assert") for n in ast.walk(tree))
    if not can_fail or not any(isinstance(n, (*checks, ast.Call)) for n in runs):
        raise UserError(f"{place}: tests: expected asserts that run; any code would pass these")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def reply_to(model, tokenizer, messages, max_new_tokens, temperature, streamer=None):
    """Replies to a batch of user messages, each cut at the end of its turn: list[str] -> [(text, tokens)].

    temperature 0 is greedy. Raises UserError when a prompt and max_new_tokens exceed the model's context.
    """
    ids = prompt_ids(tokenizer, messages)
    longest, most = max(map(len, ids)), room(model, max_new_tokens)
    if longest > most:
        raise UserError(
            f"prompt of {longest} tokens: expected at most {most}, the context less {max_new_tokens} new ones"
        )
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    # the checkpoint's generation config may bring a repetition penalty, top-k or further ends; only the ends are kept
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(
        **batch,
        **sampling,
        top_k=0 if temperature else None,
        top_p=1.0 if temperature else None,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    replies = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        replies.append((tokenizer.decode(row[:end], skip_special_tokens=True), end))
    return replies


def room(model, max_new_tokens):
    """Tokens a prompt may have. Error: UserError where nothing is left for one."""
    context = model.config.max_position_embeddings
    if max_new_tokens >= context:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: expected less than the model's context of {context} tokens"
        )
    return context - max_new_tokens


def sample(model, tokenizer, prompts, args, streamers=(None, None)):
    """One sample a prompt, in one batch: [{"plan", "code", "reply", "tokens", "seconds"}]; plan is None if direct.

    streamers: of the plan and of the reply with the code.
    """
    start, plans = time.perf_counter(), [(None, 0)] * len(prompts)
    if args.plan_then_code:
        messages = [plan_prompt(p) for p in prompts]
        most = min(PLAN_TOKENS, args.max_new_tokens)
        plans = reply_to(model, tokenizer, messages, most, args.temperature, streamers[0])
    messages = [code_prompt(p, plan) for p, (plan, _) in zip(prompts, plans, strict=True)]
    replies = reply_to(model, tokenizer, messages, args.max_new_tokens, args.temperature, streamers[1])
    seconds = round((time.perf_counter() - start) / len(prompts), 3)
    return [
        {"plan": plan, "code": extract_code(reply), "reply": reply, "tokens": used + n, "seconds": seconds}
        for (plan, used), (reply, n) in zip(plans, replies, strict=True)
    ]


def sample_to_file(model, tokenizer, name, prompts, path, args, desc):
    """args.n samples of every prompt, in batches, as JSONL rows {"index", "sample", ...sample()}; returns the rows.

    The file grows by whole batches and each batch has its own seed, so a run that was stopped goes on where it was
    and ends with what it would have ended with. A prompt over the context becomes a row with "error" and no code.
    Error: UserError when the file was made with other settings.
    """
    import torch
    from tqdm import tqdm

    names = ("plan_then_code", "n", "temperature", "seed", "max_new_tokens", "batch_size")
    head = {"model": str(name), "adapter": adapter_sha256(name)}
    head |= {n: getattr(args, n) for n in names} | {"prompts": sha256(json.dumps(prompts))}
    plan = (PLAN_TOKENS + 32) * args.plan_then_code  # a plan may come back from text as a few tokens more
    ask = [code_prompt(p, "" if plan else None) for p in prompts]
    lengths = [len(ids) + plan for ids in prompt_ids(tokenizer, ask)]
    most = room(model, args.max_new_tokens)
    fit = sorted((i for i in range(len(prompts)) if lengths[i] <= most), key=lambda i: -lengths[i])  # longest first
    jobs = [(i, k) for i in fit for k in range(args.n)]
    rows = read_samples(path, head, args.batch_size, len(jobs))
    write_jsonl(path, [head, *rows])
    with open(path, "a", encoding="utf-8") as f, tqdm(total=len(jobs), initial=len(rows), desc=desc) as bar:
        for start in range(len(rows), len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            torch.manual_seed(args.seed + start)
            new = sample(model, tokenizer, [prompts[i] for i, _ in batch], args)
            new = [{"index": i, "sample": k, **row} for (i, k), row in zip(batch, new, strict=True)]
            f.write("".join(json.dumps(row) + "\n" for row in new))
            f.flush()
            rows += new
            bar.update(len(batch))
    long = [i for i in range(len(prompts)) if lengths[i] > most]
    rows += [{"index": i, "sample": k, "error": "prompt over the context"} for i in long for k in range(args.n)]
    return sorted(rows, key=lambda row: (row["index"], row["sample"]))


def read_samples(path, head, batch_size, total):
    """The whole batches that an earlier run left in `path`."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # the last may be half a line
    if not lines:
        return []
    if json.loads(lines[0]) != head:
        raise UserError(f"{path}: begun with other settings or prompts; expected the same, or another place to write")
    rows = [json.loads(line) for line in lines[1:]]
    return rows if len(rows) == total else rows[: len(rows) // batch_size * batch_size]


# ---------------------------------------------------------------------------------------------------------------------
# What the user gets


def check_arguments(args):
    """Errors: UserError for what cannot be meant, before a model is loaded."""
    if (args.prompt is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise UserError("expected --prompt TEXT, or --input FILE with --output FILE")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; expected a request")
    if args.input and args.tests:
        raise UserError("--tests belongs to --prompt; expected a field 'tests' in the rows of --input")
    check_sampling(args)


def check_sampling(args):
    """The flags of add_sampling_arguments(); sets the default temperature."""
    for name in ("n", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.temperature is None:
        args.temperature = 0.8 if args.n > 1 else 0.0
    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100) or (args.n > 1 and args.temperature == 0):
        raise UserError(
            f"--temperature {args.temperature:g} with --n {args.n}: expected 0.01 to 100, or 0 for one sample"
        )


def answer(model, tokenizer, args, tests):
    """Samples for one prompt: all of them, or with tests the first that passes; exit code 1 when none does."""
    import torch

    torch.manual_seed(args.seed)
    stream = sys.stdout.isatty() and args.n == 1 and tests is None and not args.json
    screen = Screen()
    streamers = (streamer(tokenizer, screen.plan), streamer(tokenizer, screen.reply)) if stream else (None, None)
    kinds, empty = Counter(), 0
    for start in range(0, args.n, args.batch_size):
        rows = sample(model, tokenizer, [args.prompt] * min(args.batch_size, args.n - start), args, streamers)
        verdicts = run_many([(row["code"], tests) for row in rows]) if tests is not None else [None] * len(rows)
        for k, (row, verdict) in enumerate(zip(rows, verdicts, strict=True), start + 1):
            if verdict:
                kinds[verdict["kind"]] += 1
                print(f"sample {k}: {verdict['kind']} {verdict['detail']}".strip(), file=sys.stderr)
                if verdict["kind"] == "passed":
                    return show(row, verdict, args, k)
                continue
            row["code"] = only_code(row["reply"])
            empty += not row["code"].strip()
            if not stream:
                show(row, verdict, args, k)
            elif not screen.shown and row["code"]:
                print(row["code"])
    if tests is not None:
        print(f"no sample passes the tests: {dict(kinds)}", file=sys.stderr)
        sys.exit(1)
    if empty:
        told = "; expected a larger --max_new_tokens or another --seed (--json shows the reply)"
        print(f"no code in {empty} of {args.n} replies{told}", file=sys.stderr)
    if empty == args.n:
        sys.exit(1)


def show(row, verdict, args, k):
    """One sample: code (or JSON) to standard output, the plan beside it to standard error."""
    if args.json:
        fields = {name: row[name] for name in ("plan", "code", "reply", "tokens", "seconds")}
        print(json.dumps({"prompt": args.prompt, **fields, **({"verdict": verdict} if verdict else {})}))
        return
    if row["plan"]:
        print(f"plan:\n{row['plan']}\n", file=sys.stderr)
    if row["code"]:
        print(f"# sample {k} of {args.n}\n" * (args.n > 1 and verdict is None) + row["code"], flush=True)


def write_batch(model, tokenizer, tasks, args):
    """Samples for the rows of --input, checked where a row has tests, to --output (JSONL, by rename)."""
    part = args.output.with_name(args.output.name + ".part")
    prompts = [t["prompt"] for t in tasks]
    rows = sample_to_file(model, tokenizer, args.model_dir, prompts, part, args, "samples")
    checked = [row for row in rows if "code" in row and tasks[row["index"]].get("tests")]
    verdicts = run_many([(program(tasks[r["index"]], r["code"]), tasks[r["index"]]["tests"]) for r in checked])
    for row, verdict in zip(checked, verdicts, strict=True):
        row["verdict"] = verdict
    for row in rows:
        task = tasks[row.pop("index")]
        row |= {"task_id": task["task_id"], "prompt": task["prompt"]}
        row.pop("reply", None)
    write_jsonl(args.output, rows)
    part.unlink()
    errors = sum("error" in row for row in rows)
    print(f"{len(rows)} samples for {len(tasks)} prompts in {args.output}; over the context: {errors}", file=sys.stderr)
    if checked:
        print(f"verdicts: {dict(Counter(row['verdict']['kind'] for row in checked))}", file=sys.stderr)


def add_sampling_arguments(p):
    """The flags that eval_codegen.py shares."""
    p.add_argument("--n", type=int, default=1, help="samples a prompt (default 1); time grows with it")
    p.add_argument("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.8 for several)")
    p.add_argument("--seed", type=between(int, 0, 2**32 - 1), default=SEED, help=f"of the sampling (default {SEED})")
    p.add_argument(
        "--max_new_tokens", type=int, default=384, help="of a reply (default 384); the longest sets the time"
    )
    p.add_argument("--batch_size", type=int, default=16, help="prompts at a time (default 16); memory grows with it")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", required=True, help="adapter folder, model folder, hub id or smollm2-135m")
    p.add_argument("--prompt", help="the request")
    p.add_argument(
        "--plan_then_code", action="store_true", help="a plan first, then code that follows it; twice the calls"
    )
    p.add_argument(
        "--tests", type=Path, help="file of asserts; prints the first sample that passes them in the sandbox"
    )
    p.add_argument("--json", action="store_true", help="print plan, code, reply, tokens and seconds, a line a sample")
    p.add_argument("--input", type=Path, help="JSONL of prompts (and tests), instead of --prompt")
    p.add_argument("--output", type=Path, help="JSONL of samples for --input; a stopped run goes on where it was")
    add_sampling_arguments(p)
    cli(main, p)
