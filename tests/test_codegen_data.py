"""codegen_prepare.py and what it shares with infer: the shipped tasks, prompts and extraction, mutations, bad input."""

import ast
import json
import re
from collections import Counter

import pytest

from codegen_prepare import code_grams, description_grams, drop_near_duplicates, overlaps
from distill.files import ROOT, FilledText, StrictModel, UserError, read_rows
from distill.tasks.codegen_mutants import mutants
from distill.tasks.codegen_reply import extract_code, fenced
from distill.tasks.codegen_sandbox import run_many
from distill.tasks.codegen_tasks import code_prompt, humaneval, plan_prompt, program, read_tasks

SHIPPED = ROOT / "data" / "codegen_tasks.jsonl"
ADD = {"prompt": "Write add(a, b).", "solution": "def add(a, b):\n    return a + b", "tests": "assert add(1, 2) == 3"}
MBPP = {
    "text": "Write a function to double a number.",
    "code": "def double(n):\r\n    return n * 2",
    "task_id": 1,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
}


# The shipped tasks


class PlannedTask(StrictModel):
    topic: FilledText
    plan: FilledText


def test_shipped_tasks_are_many_different_and_complete():
    tasks = read_tasks(SHIPPED)
    assert len(tasks) >= 300
    topics = Counter(row["topic"] for row in read_rows(SHIPPED, PlannedTask))
    assert set(topics) == {"strings", "lists", "numbers", "dictionaries", "dates", "recursion", "classes", "files"}
    assert min(topics.values()) >= 30
    for task in tasks:
        asserts = [n for n in ast.walk(ast.parse(task["tests"])) if isinstance(n, ast.Assert)]
        assert len(asserts) >= 3, task["task_id"]
        assert task["plan"].startswith("1. ")
    for field in ("task_id", "prompt", "solution", "tests"):
        assert len({t[field] for t in tasks}) == len(tasks), field
    names = [re.findall(r"`(\w+)", t["prompt"])[0] for t in tasks]
    assert all(name in t["tests"] for name, t in zip(names, tasks, strict=True))
    assert len(set(names)) == len(names)


def test_shipped_solutions_pass_and_nothing_does_not():
    tasks = read_tasks(SHIPPED)
    verdicts = run_many([(t["solution"], t["tests"]) for t in tasks] + [("", t["tests"]) for t in tasks[::8]])
    failing = [(t["task_id"], v) for t, v in zip(tasks, verdicts[: len(tasks)], strict=True) if v["kind"] != "passed"]
    assert not failing
    assert not [v for v in verdicts[len(tasks) :] if v["kind"] == "passed"]


def test_shipped_tasks_resemble_no_humaneval_problem():
    dropped = Counter()
    assert len(drop_near_duplicates(read_tasks(SHIPPED), humaneval(), dropped)) >= 300
    assert not dropped


# Near-duplicates


def test_overlap_by_hand():
    a = code_grams("a b c d e f g h i j")  # 5 six-grams
    assert len(a) == 5
    assert overlaps(a, a)
    assert not overlaps(a, code_grams("a b c d e f g h i J"))  # 4 shared of 5 are too few
    assert overlaps(a, code_grams("b c d e f g h i"))  # 3 shared are all that the problem has
    assert not overlaps(a, code_grams("b c d e f g h I"))
    assert overlaps(a, code_grams("x y z a b c d e f g h i j k l m"))  # 5 of 5
    assert description_grams('def f():\n    """One two three four five. >>> f()"""') == {
        ("one", "two", "three", "four"),
        ("two", "three", "four", "five"),
    }
    assert not overlaps(set(), a)


def test_near_duplicates_of_humaneval_are_found():
    problem = humaneval()[0]
    renamed = problem["stub"].replace("has_close_elements", "any_near")
    other_words = {"prompt": "Any pair closer than t?", "solution": problem["stub"] + problem["solution"], "tests": "x"}
    same_words = {"prompt": renamed, "solution": "pass", "tests": "x"}
    dropped = Counter()
    assert drop_near_duplicates([other_words, same_words, ADD], humaneval(), dropped) == [ADD]
    assert dropped == {"near-duplicate of HumanEval": 2}


def test_every_humaneval_problem_is_found_under_another_name():
    """Short ones too: `Return length of given string` has two 4-grams."""
    renamed = []
    for problem in humaneval():
        name = re.search(r"check\((\w+)\)$", problem["tests"])[1]
        stub = re.sub(rf"\b{name}(?=\()", "another", problem["stub"])
        renamed.append({"prompt": re.sub(r"\s+", "  ", stub), "solution": "pass"})
    dropped = Counter()
    assert [row["prompt"] for row in drop_near_duplicates(renamed, humaneval(), dropped)] == []
    assert dropped == {"near-duplicate of HumanEval": 164}


# Mutations


def test_mutants_differ_in_one_place():
    code = 'def f(xs, n):\n    # grüße\n    if not xs and n >= 3:\n        return "ä"\n'
    code += "    return [x for x in xs[1:] if x < n]\n"
    found = mutants(code)
    assert {kind for kind, _ in found} == {"operator", "off by one", "bound", "missing return", "condition"}
    assert len({m for _, m in found}) == len(found)
    for _, mutant in found:
        ast.parse(mutant)
        different = [a for a, b in zip(code.split("\n"), mutant.split("\n"), strict=True) if a != b]
        assert len(different) == 1
        assert "# grüße" in mutant
    edited = {m.split("\n")[2].strip() for _, m in found}
    assert {"if xs and n >= 3:", "if not xs or n >= 3:", "if not xs and n > 3:", "if not xs and n >= 4:"} < edited
    last = {m.split("\n")[4].strip() for _, m in found}
    assert {"[x for x in xs[1:] if x < n]", "return [x for x in xs[:] if x < n]"} < last


@pytest.mark.parametrize(
    ("code", "mutant"),
    [
        ("for i in range(2, n): a(i)", "for i in range(2, n - 1): a(i)"),
        ("for i in range(n): a(i)", "for i in range(n - 1): a(i)"),
        ("b = a[:n]", "b = a[1:n]"),
        ("b = (a) % (b)", "b = (a) // (b)"),
        ("b = a not in c", "b = a in c"),
        ("b = 0", "b = 1"),
    ],
)
def test_mutants_by_hand(code, mutant):
    assert mutant in [m for _, m in mutants(code)]


# Prompts and extraction


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("Sure!\n```python\ndef f():\n    pass\n```\nDone.", "def f():\n    pass"),
        ("```\ndef f(): pass\n```", "def f(): pass"),
        ("```py\ndef f():\n    pass", "def f():\n    pass"),
        ("```bash\npip install x\n```\n```python\ndef f(): pass\n```", "def f(): pass"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("Here it is:\nimport os\ndef f(): pass", "import os\ndef f(): pass"),
        ("def f():\n    return '```'", "def f():\n    return '```'"),
        ("    return 1", "    return 1"),
        ("I cannot.", "I cannot."),
        ("", ""),
    ],
)
def test_extract_code(reply, code):
    assert extract_code(reply) == code


def test_what_is_trained_is_what_is_extracted():
    for task in read_tasks(SHIPPED):
        assert extract_code(fenced(task["solution"])) == task["solution"].strip()
        assert extract_code(f"{task['plan']}\n\n{fenced(task['solution'])}") == task["solution"].strip()


def test_program_puts_a_stub_before_body_and_function():
    task = {"stub": 'import math\n\ndef f(x):\n    """Doc."""\n'}
    for code in ("    return math.floor(x)", "def f(x):\n    return math.floor(x)"):
        space = {}
        exec(program(task, code), space)
        assert space["f"](1.5) == 1
    assert program({}, "    x = 1") == "    x = 1"


def test_mbpp_form(jsonl):
    (task,) = read_tasks(jsonl("mbpp.jsonl", [MBPP]))
    assert task["task_id"] == "1"
    assert task["prompt"].endswith("pass these tests:\nassert double(2) == 4\nassert double(0) == 0")
    assert task["solution"] == "def double(n):\n    return n * 2"


# The script


def test_prepare_script(run, jsonl, tmp_path):
    problem = humaneval()[0]
    copy = {"prompt": problem["stub"], "solution": problem["stub"] + problem["solution"], "tests": "assert True"}
    corpus = jsonl(
        "corpus.jsonl",
        [
            {**ADD, "plan": "1. Add."},
            {**ADD, "prompt": "wrong", "tests": "assert add(1, 2) == 4"},
            {**ADD, "prompt": "loop", "solution": "while True:\n    pass"},
            {**ADD, "prompt": "broken tests", "tests": "assert add(1, 2 == 3"},
            {**ADD, "prompt": "no tests", "tests": []},
            {**ADD, "prompt": "syntax", "solution": "def add(a, b) return a"},
            copy,
        ],
    )
    r = run("codegen_prepare.py", "--corpus", corpus, jsonl("mbpp.jsonl", [MBPP]), "--out_dir", tmp_path / "out")
    assert r.returncode == 0, r.stderr
    assert "2 of 8 tasks kept" in r.stdout
    for reason in (
        "wrong answer': 1",
        "timeout': 1",
        "or check nothing': 1",
        "or no tests': 1",
        "syntax': 1",
        "HumanEval': 1",
    ):
        assert reason in r.stdout, r.stdout
    sft, kd, dpo = (
        [json.loads(line) for line in (tmp_path / "out" / f"codegen_{route}.jsonl").read_text().splitlines()]
        for route in ("sft", "kd", "dpo")
    )
    assert [row["input"] for row in sft[:3]] == [
        code_prompt(ADD["prompt"]),
        plan_prompt(ADD["prompt"]),
        code_prompt(ADD["prompt"], "1. Add."),
    ]
    assert sft[1]["output"] == "1. Add."
    assert len(sft) == 4
    assert kd[0]["teacher_output"] == "1. Add.\n\n```python\ndef add(a, b):\n    return a + b\n```"
    assert {"```python\ndef add(a, b):\n    return a - b\n```", "```python\ndef add(a, b):\n    a + b\n```"} == {
        row["rejected"] for row in dpo if row["prompt"] == code_prompt(ADD["prompt"])
    }
    again = run("codegen_prepare.py", "--corpus", corpus, "--out_dir", tmp_path / "again")
    assert again.returncode == 0
    first = (tmp_path / "out" / "codegen_dpo.jsonl").read_text()
    assert first.startswith((tmp_path / "again" / "codegen_dpo.jsonl").read_text())


def test_prepare_takes_what_a_teacher_wrote_and_the_sandbox_saw_pass(run, jsonl, tmp_path):
    good = "def add(a, b):\n    return sum((a, b))"
    samples = [
        {"prompt": ADD["prompt"], "code": good, "plan": "1. Sum both.\n"},
        {"prompt": ADD["prompt"], "code": good + "\n", "plan": "1. Say it again."},
        {"prompt": ADD["prompt"], "code": "def add(x, y):\n    return x + y", "plan": None},
        {"prompt": ADD["prompt"], "code": "def add(x, y):\n    return y + x", "plan": "```python\ndef add(): pass"},
        {"prompt": ADD["prompt"], "code": "def add(a, b):\n    return 0"},
        {"prompt": ADD["prompt"], "error": "prompt over the context"},
        {"prompt": "another", "code": good},
    ]
    corpus = jsonl("corpus.jsonl", [{**ADD, "plan": "1. Add."}])
    teacher = jsonl("teacher.jsonl", samples)
    r = run("codegen_prepare.py", "--corpus", corpus, "--teacher", teacher, "--out_dir", tmp_path)
    assert r.returncode == 0, r.stderr
    assert "'teacher: no code, or no such task': 2, 'teacher fails: wrong answer': 1" in r.stdout
    rows = [json.loads(line) for line in (tmp_path / "codegen_kd.jsonl").read_text().splitlines()]
    planned = f"1. Sum both.\n\n{fenced(good)}"  # the sample's own plan; without one none is borrowed from the corpus
    bare = [fenced(f"def add(x, y):\n    return {sum}") for sum in ("x + y", "y + x")]
    assert [row["teacher_output"] for row in rows] == [planned, *bare]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"solution": "x"}], "row 1: field 'prompt' is missing"),
        ([ADD, {**ADD, "tests": 5}], "row 2: field 'tests': expected a valid string or a valid list, got 5"),
        ([{"text": "x"}], "row 1: field 'test_list' is missing"),
        ([{**ADD, "prompt": "  "}], "row 1: field 'prompt': expected text that is not blank, got '  '"),
        ([{**ADD, "tests": "assert False"}], "none of 1 tasks is left: {'solution fails: wrong answer': 1}"),
        ([], "the file is empty"),
    ],
)
def test_prepare_bad_input(run, jsonl, tmp_path, rows, message):
    r = run("codegen_prepare.py", "--corpus", jsonl("bad.jsonl", rows), "--out_dir", tmp_path)
    assert r.returncode == 2
    assert message in r.stderr
    assert r.stderr.count("\n") == 1
    assert not list(tmp_path.glob("codegen_*"))


def test_a_line_that_is_not_json_is_reported_with_its_number(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ADD) + "\nnonsense\n")
    with pytest.raises(UserError, match=r"x\.jsonl:2: not JSON"):
        read_tasks(path)


# What other models wrote


def test_solutions_of_a_large_model_are_run_and_evaluation_problems_left_out(run, jsonl, tmp_path):
    double = {**{k: v for k, v in MBPP.items() if k != "code"}, "solution": "def double(n):\n    return n + n"}
    wrong = {**double, "solution": "def double(n):\n    return n"}
    other = {
        "text": "Write a function that counts the vowels of a word, upper and lower case, y being none.",
        "code": "def vowels(word):\n    return sum(c in 'aeiou' for c in word.lower())",
        "test_list": ["assert vowels('Apple') == 2", "assert vowels('try') == 0"],
        "task_id": 2,
    }
    renamed = {**other, "text": "Count vowels.", "test_list": ["assert   vowels('Apple')==2"], "task_id": 3}
    corpus, held = jsonl("large.jsonl", [double, wrong, other, renamed]), jsonl("held.jsonl", [other])
    done = run("codegen_prepare.py", "--corpus", corpus, "--exclude", held, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "codegen_sft.jsonl").read_text().splitlines()]
    assert [extract_code(r["output"]) for r in rows] == [double["solution"]]
    assert "'a problem of held.jsonl': 2" in done.stdout and "'solution fails: wrong answer': 1" in done.stdout


def test_passing_samples_train_and_failing_ones_are_rejected(run, parsed, jsonl, tmp_path):
    corpus = jsonl("corpus.jsonl", [MBPP])
    prompt = read_tasks(corpus)[0]["prompt"]
    codes = ["def double(n):\n    return n << 1", "def double(n):\n    return n", "def double(n)\n    return", ""]
    samples = jsonl("samples.jsonl", [{"prompt": prompt, "code": code} for code in [*codes, codes[0]]])
    done = run("codegen_prepare.py", "--corpus", corpus, "--samples", samples, "--out_dir", tmp_path, "--rejected", 0)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 different samples pass, for 1 tasks" in done.stdout
    train, evaluate = (parsed(line.removeprefix("next:")) for line in done.stdout.splitlines()[-2:])
    assert train.data == tmp_path / "codegen_sft.jsonl" and [str(train.save_dir)] == evaluate.model_dir
    made = {
        r: [json.loads(x) for x in (tmp_path / f"codegen_{r}.jsonl").read_text().splitlines()] for r in ("sft", "dpo")
    }
    assert extract_code(made["sft"][-1]["output"]) == codes[0] and len(made["sft"]) == 2
    assert [(extract_code(r["chosen"]), extract_code(r["rejected"])) for r in made["dpo"]] == [(codes[0], codes[1])]
