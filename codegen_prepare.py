"""Code tasks -> data/codegen_{sft,kd,dpo}.jsonl: every solution executed, nothing that resembles HumanEval.

    python codegen_prepare.py                                                  # the shipped tasks
    python codegen_prepare.py --corpus data/codegen_tasks.jsonl my_mbpp.jsonl --teacher runs/teacher_samples.jsonl
    python codegen_prepare.py --limit 10 --out_dir runs/try                                                    # CPU

A corpus is JSONL of {"prompt", "solution", "tests", "plan"?} or MBPP's {"text", "code", "test_list"}. A teacher file
is what `infer_codegen.py --input CORPUS --output FILE --n 4 [--plan_then_code]` of a larger model wrote. Samples of the
student itself (--samples) make verified self-distillation: the sandbox keeps what passes, the student trains on it.
"""

import argparse
import random
import re
import shlex
from collections import Counter
from pathlib import Path

from common import SEED
from distill.files import ROOT, UserError, check_output_folder, cli, read_rows, write_jsonl
from distill.model.hub import EMBEDDED
from distill.tasks.codegen_mutants import mutants
from distill.tasks.codegen_reply import fenced
from distill.tasks.codegen_sandbox import TIMEOUT, add_isolation_argument, require_isolation, run_many
from distill.tasks.codegen_tasks import SampleRow, code_prompt, humaneval, parse_tests, plan_prompt, read_tasks

WORDS, TOKENS = 4, 6  # n-gram lengths of descriptions and of code
OVERLAP, SHARED = 0.4, 5  # a near-duplicate shares this part of the shorter side's n-grams, and at least SHARED of them
TRIES = 4  # mutants tried for each rejected answer wanted


def main(args):
    check_output_folder("--out_dir", args.out_dir)
    print(require_isolation(args.require_isolation))
    tasks = [task for path in args.corpus for task in read_tasks(path)][: args.limit]
    total, dropped = len(tasks), Counter()
    tasks = drop_incomplete(tasks, dropped)
    tasks = drop_near_duplicates(tasks, humaneval(), dropped)
    for path in args.exclude:
        tasks = drop_same_problems(tasks, read_tasks(path), path.name, dropped)
    tasks = drop_failing(tasks, dropped)
    if not tasks:
        raise UserError(f"{args.corpus[0]}: none of {total} tasks is left: {dict(dropped)}")
    teacher = teacher_outputs(args.teacher, tasks, dropped) if args.teacher else own_outputs(tasks)
    rows = {"sft": sft_rows(tasks), "kd": teacher, "dpo": dpo_rows(tasks, args.rejected, args.seed)}
    for path in args.samples:
        passing, failing = run_samples(path, tasks)
        rows["sft"] += [{"input": r["input"], "output": r["teacher_output"], "group": r["group"]} for r in passing]
        rows["kd"] += passing
        rows["dpo"] += sample_pairs(passing, failing, args.seed)
    print(f"{len(tasks)} of {total} tasks kept; dropped: {dict(dropped) or 'none'}")
    for route, made in rows.items():
        path = args.out_dir / f"codegen_{route}.jsonl"
        write_jsonl(path, made)
        print(f"{path}: {len(made)} rows")
    data = shlex.quote(str(args.out_dir / "codegen_sft.jsonl"))
    print(f"next: python sft_train.py --student {EMBEDDED} --data {data} --save_dir runs/codegen_sft")
    print("      python eval_codegen.py --model_dir runs/codegen_sft --out runs/codegen_eval")


# ---------------------------------------------------------------------------------------------------------------------
# Which tasks are kept


def drop_incomplete(tasks, dropped):
    kept = []
    for task in tasks:
        if not task["tests"].strip() or not task.get("solution", "").strip():
            dropped["no solution or no tests"] += 1
            continue
        try:
            parse_tests(task["tests"], task["task_id"])
        except UserError:
            dropped["tests do not parse, or check nothing"] += 1
        else:
            kept.append(task)
    return kept


def drop_failing(tasks, dropped):
    """Tasks whose solution passes its own tests in the sandbox."""
    verdicts = run_many([(t["solution"], t["tests"]) for t in tasks], desc="solutions")
    for verdict in verdicts:
        if verdict["kind"] != "passed":
            dropped[f"solution fails: {verdict['kind']}"] += 1
    return [t for t, v in zip(tasks, verdicts, strict=True) if v["kind"] == "passed"]


def drop_near_duplicates(tasks, problems, dropped):
    """Tasks that resemble no evaluation problem, neither in their description nor in their solution."""
    known = [(description_grams(p["prompt"]), code_grams(p["solution"])) for p in problems]
    of_description, kept = {}, []  # several solutions of one problem share its description
    for task in tasks:
        words, tokens = description_grams(task["prompt"]), code_grams(task["solution"])
        if task["prompt"] not in of_description:
            of_description[task["prompt"]] = any(overlaps(words, w) for w, _ in known)
        if of_description[task["prompt"]] or any(overlaps(tokens, t) for _, t in known):
            dropped["near-duplicate of HumanEval"] += 1
        else:
            kept.append(task)
    return kept


def drop_same_problems(tasks, problems, source, dropped):
    """Tasks that share neither their description nor an assert with one of `problems`, whoever solved them."""
    descriptions, asserts = {description(p["prompt"]) for p in problems}, set()
    for problem in problems:
        asserts |= assert_lines(problem["tests"])
    kept = [t for t in tasks if description(t["prompt"]) not in descriptions and not assert_lines(t["tests"]) & asserts]
    if len(kept) < len(tasks):
        dropped[f"a problem of {source}"] += len(tasks) - len(kept)
    return kept


def description(prompt):
    """What a prompt says before its tests, as lower-case words."""
    return tuple(re.findall(r"\w+", prompt.split("\nYour code should pass")[0].lower()))


def assert_lines(tests):
    return {re.sub(r"\s+", "", line) for line in tests.split("\n") if line.strip().startswith("assert")}


def description_grams(prompt):
    """Word n-grams of what a prompt says: of a stub the last docstring, in both cases without the examples."""
    docstrings = re.findall(r"\"\"\"(.*?)\"\"\"|'''(.*?)'''", prompt, flags=re.DOTALL)
    text = "".join(docstrings[-1]) if docstrings else prompt
    text = re.split(r">>>|\nYour code should pass", text)[0]
    return ngrams(re.findall(r"[a-z]+|\d+", text.lower()), WORDS)


def code_grams(code):
    return ngrams(re.findall(r"\w+|[^\w\s]", code), TOKENS)


def ngrams(items, n):
    return {tuple(items[i : i + n]) for i in range(len(items) - n + 1)}


def overlaps(task, problem):
    """Whether a task's n-grams resemble a problem's. A problem too short to share SHARED must be in the task whole."""
    shared = len(task & problem)
    if len(problem) < SHARED:
        return 0 < shared == len(problem)
    return shared >= SHARED and shared / min(len(task), len(problem)) >= OVERLAP


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def sft_rows(tasks):
    """{"input", "output", "group"}: the code, and where a task has a plan, the plan and the code that follows it."""
    rows = []
    for task in tasks:
        pairs = [(code_prompt(task["prompt"]), fenced(task["solution"]))]
        if task.get("plan"):
            pairs.append((plan_prompt(task["prompt"]), task["plan"]))
            pairs.append((code_prompt(task["prompt"], task["plan"]), fenced(task["solution"])))
        rows += [{"input": i, "output": o, "group": task["task_id"]} for i, o in pairs]
    return rows


def kd_row(task, plan, code):
    """The plan, where there is one, is said before the code; with a fence in it, it would be taken for the code."""
    plan = "" if not plan or "```" in plan else f"{plan.strip()}\n\n"
    return {"input": code_prompt(task["prompt"]), "teacher_output": plan + fenced(code), "group": task["task_id"]}


def own_outputs(tasks):
    """KD rows without a teacher's file: the corpus is the teacher."""
    return [kd_row(task, task.get("plan"), task["solution"]) for task in tasks]


def teacher_outputs(path, tasks, dropped):
    """KD rows {"input", "teacher_output", "group"} from a teacher's different samples that pass the task's tests.

    A sample brings its own plan (infer_codegen.py --plan_then_code) or none: the corpus' may be of another solution.
    """
    by_prompt = {task["prompt"]: task for task in tasks}
    plans = {}
    for row in read_rows(path, SampleRow):
        if row["prompt"] not in by_prompt or not row.get("code"):
            dropped["teacher: no code, or no such task"] += 1
        else:
            plans.setdefault((row["prompt"], row["code"].strip()), row.get("plan"))  # repeated code: its first plan
    verdicts = run_many([(code, by_prompt[prompt]["tests"]) for prompt, code in plans], desc="teacher")
    rows = []
    for ((prompt, code), plan), verdict in zip(plans.items(), verdicts, strict=True):
        if verdict["kind"] == "passed":
            rows.append(kd_row(by_prompt[prompt], plan, code))
        else:
            dropped[f"teacher fails: {verdict['kind']}"] += 1
    if not rows:
        raise UserError(f"{path}: no sample passes the tests of the corpus; expected samples for its prompts")
    return rows


def run_samples(path, tasks):
    """(passing, failing) samples of a model for the prompts of the corpus, as KD rows; equal code counts once.

    A sample that is no Python is in neither: DPO would learn to tell syntax errors, which SFT has taught already.
    """
    by_prompt, seen = {task["prompt"]: task for task in tasks}, {}
    for row in read_rows(path, SampleRow):
        if row["prompt"] in by_prompt and row.get("code"):
            seen[row["prompt"], row["code"].strip()] = None
    verdicts = run_many([(code, by_prompt[prompt]["tests"]) for prompt, code in seen], desc="samples")
    passing, failing = [], []
    for (prompt, code), verdict in zip(seen, verdicts, strict=True):
        if verdict["kind"] in ("passed", "wrong answer", "exception"):
            side = passing if verdict["kind"] == "passed" else failing
            side.append(kd_row(by_prompt[prompt], None, code))
    print(
        f"{path}: {len(passing)} of {len(seen)} different samples pass, for {len({r['input'] for r in passing})} tasks"
    )
    return passing, failing


def sample_pairs(passing, failing, seed):
    """DPO rows: every passing sample against one failing sample of the same task, where there is one."""
    rng, wrong = random.Random(seed), {}
    for row in failing:
        wrong.setdefault(row["input"], []).append(row["teacher_output"])
    return [
        {
            "prompt": r["input"],
            "chosen": r["teacher_output"],
            "rejected": rng.choice(wrong[r["input"]]),
            "group": r["group"],
        }
        for r in passing
        if r["input"] in wrong
    ]


def dpo_rows(tasks, wanted, seed):
    """{"prompt", "chosen", "rejected", "group"}: rejected is a mutant of the solution that the sandbox saw fail.

    A mutant that times out is not taken: on a busy machine that proves little.
    """
    tried = []
    for i, task in enumerate(tasks):
        found = mutants(task["solution"])
        random.Random(f"{seed}:{task['task_id']}").shuffle(found)
        tried += [(i, kind, code) for kind, code in found[: wanted * TRIES]]
    verdicts = run_many([(code, tasks[i]["tests"]) for i, _, code in tried], timeout=TIMEOUT // 2, desc="mutants")
    taken, kinds = [{} for _ in tasks], Counter()
    for (i, kind, code), verdict in zip(tried, verdicts, strict=True):
        task, mine = tasks[i], taken[i]
        # one of each kind, so that the pairs do not all teach the same mistake
        if verdict["kind"] in ("wrong answer", "exception") and len(mine) < wanted and kind not in mine:
            mine[kind] = {
                "prompt": code_prompt(task["prompt"]),
                "chosen": fenced(task["solution"]),
                "rejected": fenced(code),
                "group": task["task_id"],
            }
            kinds[kind] += 1
    outcomes = Counter(v["kind"] for v in verdicts)
    print(f"{len(tried)} mutants run: {dict(outcomes)}; rejected answers by mutation: {dict(kinds)}")
    print(f"tasks without a rejected answer: {taken.count({})}")
    return [row for mine in taken for row in mine.values()]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = ROOT / "data" / "codegen_tasks.jsonl"
    p.add_argument("--corpus", type=Path, nargs="+", default=[shipped], help="JSONL files (default: the shipped tasks)")
    p.add_argument("--teacher", type=Path, help="samples of a larger model for KD (default: the corpus' plan and code)")
    p.add_argument(
        "--samples",
        type=Path,
        nargs="+",
        default=[],
        help="a model's samples: those that pass train, those that fail are rejected",
    )
    p.add_argument(
        "--exclude", type=Path, nargs="+", default=[], help="problems to evaluate on: what resembles one is dropped"
    )
    p.add_argument("--rejected", type=int, default=2, help="most DPO pairs a task (default 2); 4 runs for each")
    p.add_argument("--out_dir", type=Path, default=ROOT / "data", help="folder of the three files (default data)")
    p.add_argument("--limit", type=int, help="only the first tasks, to try it out (default: all)")
    p.add_argument("--seed", type=int, default=SEED, help=f"of the choice of mutants (default {SEED})")
    add_isolation_argument(p)
    cli(main, p)
