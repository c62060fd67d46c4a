"""eval_codegen.py and infer_codegen.py: pass@k by hand, the harness on known answers, the scripts on a tiny model."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import infer_codegen
from common import row_hash
from distill.files import ROOT, UserError, printable
from distill.tasks import codegen_sandbox
from distill.tasks.codegen_reply import Screen, extract_code
from distill.tasks.codegen_samples import Sampling
from distill.tasks.codegen_sandbox import run_sandboxed
from distill.tasks.codegen_tasks import code_prompt, humaneval, parse_tests, program, read_tasks
from eval_codegen import do_nothing, interval_of_mean, pass_at_k

TASKS = [
    {"task_id": "a", "prompt": "Write one().", "solution": "def one():\n    return 1", "tests": "assert one() == 1"},
    {"task_id": "b", "prompt": "Write two().", "solution": "def two():\n    return 2", "tests": ["assert two() == 2"]},
]
UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 1)\n"
SMALL = ("--max_new_tokens", "6", "--batch_size", "2")
ADD = ("--model_dir", "smollm2-135m", "--prompt", "Write a function add(a, b) that returns a + b.")  # it can do that
FENCED = "Sure.\n```bash\npip install\n```\n```python\nimport os\n\ndef one():\n    return 1\n```\nNow\n```\none()\n```"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def here(monkeypatch, capsys):
    """Like `run`, in this process: without the seconds that importing torch takes each time."""

    def start(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        returncode = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            returncode = e.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=said.out, stderr=said.err)

    return start


# The mathematics


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (10, 0, 1, 0.0),
        (10, 3, 1, 0.3),
        (10, 10, 1, 1.0),
        (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (4, 1, 3, 0.75),  # 1 - C(3,3)/C(4,3) = 1 - 1/4
        (10, 1, 10, 1.0),
        (6, 2, 3, 0.8),  # 1 - C(4,3)/C(6,3) = 1 - 4/20
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k([n], [c], k) == pytest.approx([expected])


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    p = 0.3
    estimates = pass_at_k([10] * 20000, rng.binomial(10, p, 20000), 5)
    assert estimates.mean() == pytest.approx(1 - (1 - p) ** 5, abs=0.005)


# HumanEval and the harness


def test_humaneval_problems():
    problems = humaneval()
    assert len(problems) == 164
    assert problems[0]["task_id"] == "HumanEval/0"
    whole = problems[38]  # its stub brings the function that is to be inverted
    code = whole["stub"] + whole["solution"]
    assert run_sandboxed(program(whole, code), whole["tests"])["kind"] == "passed"
    only = code[code.index("def decode_cyclic") :]
    assert run_sandboxed(program(whole, only), whole["tests"])["kind"] == "passed"
    assert run_sandboxed(program(whole, "I cannot"), whole["tests"])["kind"] == "syntax"


def test_do_nothing():
    assert do_nothing({"stub": "x"}) == "    return None\n"
    assert do_nothing({"solution": "class A:\n    def f(self): pass\ndef g(): pass"}).count("def ") == 2


def test_reference_mode_on_humaneval(run):
    r = run("eval_codegen.py", "--reference")
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith("sandbox: ")
    assert "reference: 164 of 164 pass" in r.stdout
    assert "return None: 0 of 164 pass" in r.stdout


def test_reference_mode_finds_a_wrong_reference(run, jsonl):
    wrong = {**TASKS[0], "solution": "def one():\n    return 7"}
    nothing = {"task_id": "c", "prompt": "x", "solution": "def f(): return None", "tests": "assert f() is None"}
    r = run("eval_codegen.py", "--reference", "--problems", jsonl("p.jsonl", [wrong, nothing]))
    assert r.returncode == 1
    assert "reference: a: wrong answer assert one() == 1" in r.stderr
    assert "return None: c: passed" in r.stderr


# The evaluation of a model


def test_eval_reports_resumes_and_counts_what_code_does(here, tiny, parsed, jsonl, tmp_path):
    long = {"task_id": "long", "prompt": "word " * 2000, "tests": "assert True"}
    problems = jsonl("p.jsonl", [*TASKS, long])
    command = ["eval_codegen.py", "--model_dir", tiny, "--mode", "direct", "plan", "--problems", problems]
    command += ["--n", "3", "--k", "1", "3", "--timeout", "1", *SMALL, "--out_dir", tmp_path / "out"]
    r = here(*command)
    assert r.returncode == 0, r.stderr
    assert parsed(r.stdout.splitlines()[-1].removeprefix("next: ")).model_dir == str(tiny)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [x["mode"] for x in report["results"]] == ["direct", "plan"]
    assert report["args"]["n"] == 3
    first = report["results"][0]
    assert first["samples"] == 9
    assert first["kinds"]["prompt over the context"] == 3
    assert sum(first["kinds"].values()) == 9
    path = next((tmp_path / "out").glob("*_direct.samples.jsonl"))
    whole = path.read_text()

    # stopped in the middle of a line: goes on to the same file
    path.write_text(whole[: len(whole) * 2 // 3])
    assert here(*command).returncode == 0

    def without_seconds(text):
        rows = [{**json.loads(line), "seconds": 0} for line in text.splitlines()]
        return sorted(rows, key=lambda row: (row.get("index", -1), row.get("sample")))

    assert without_seconds(path.read_text()) == without_seconds(whole)

    # other code in place of what a random model says: contained, counted, reported
    head, *rows = lines(path)
    assert {(row["index"], row["sample"]) for row in rows} == {(i, k) for i in range(2) for k in range(3)}
    bad = {
        ("a", 0): ("def one():\n    return 1", "passed"),
        ("a", 1): ("def one():\n    while True:\n        pass", "timeout"),
        ("a", 2): ("while True:\n    print('flood' * 1000)", "exception"),
        ("b", 0): ("def two():\n    return bytearray(3 << 30)", "exception"),
        ("b", 1): ("import os\nos._exit(0)", "exception"),
        ("b", 2): ("def two(:", "syntax"),
    }
    for row in rows:
        row["code"] = bad["ab"[row["index"]], row["sample"]][0]
    path.write_text("".join(json.dumps(x) + "\n" for x in [head, *rows]))
    r = here(*command)
    assert r.returncode == 0, r.stderr
    first = json.loads((tmp_path / "out" / "report.json").read_text())["results"][0]
    assert {k: v for k, v in first["kinds"].items() if v} == {
        **Counter(kind for _, kind in bad.values()),
        "prompt over the context": 3,
    }
    assert first["pass@1"]["value"] == pytest.approx(1 / 9)
    assert first["pass@3"]["value"] == pytest.approx(1 / 3)
    assert first["syntax_errors"]["value"] == pytest.approx(1 / 9)
    per_problem = {"pass@1": [1 / 3, 0, 0], "pass@3": [1, 0, 0], "syntax_errors": [0, 1 / 3, 0]}
    header, row = r.stdout.splitlines()[1:3]
    for name, scores in per_problem.items():
        low, high = interval_of_mean(scores)
        assert first[name]["interval_95"] == pytest.approx([low, high])
        assert name in header and f"{np.mean(scores):.3f} [{low:.3f}, {high:.3f}]" in row
    by_task = {row["task_id"]: row for row in lines(next((tmp_path / "out").glob("*_direct.jsonl")))}
    assert by_task["a"]["passed"] == 1
    assert by_task["a"]["samples"][2]["verdict"]["detail"] == "printed more than 1 MiB"

    # other settings on the same files
    r = here(*command, "--seed", "7")
    assert r.returncode == 2
    assert "begun with other settings" in r.stderr


def test_eval_refuses_problems_that_were_trained_on(here, tiny_adapter, jsonl, tmp_path):
    folder = tiny_adapter("codegen")
    (folder / "train_rows.txt").write_text(row_hash(code_prompt(TASKS[0]["prompt"])) + "\n")
    command = ["eval_codegen.py", "--model_dir", folder, "--problems", jsonl("p.jsonl", TASKS), *SMALL]
    r = here(*command, "--out_dir", tmp_path / "out")
    assert r.returncode == 2
    assert "trained on 1 of the 2 evaluation rows; expected none" in r.stderr
    r = here(*command, "--out_dir", tmp_path / "out", "--allow_overlap", "--last", "2", "--limit", "1")
    assert r.returncode == 0, r.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["results"][0]["training_overlap"] == report["overlap"] == 1 and not report["overlap_unknown"]
    assert report["problems"] == 1
    (folder / "train_rows.txt").unlink()
    r = here(*command, "--out_dir", tmp_path / "out", "--limit", "1")
    assert f"{folder}: no train_rows.txt, so its overlap with the evaluation rows is unknown" in r.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["overlap"] == 0 and report["overlap_unknown"] == [str(folder)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_dir", "x"], "expected --model_dir and --out, or --reference"),
        (["--model_dir", "x", "--out", "y", "--k", "5"], "--k 5: expected at most --n 1"),
        (["--model_dir", "x", "--out_dir", "y", "--n", "2", "--temperature", "0"], "expected 0.01 to 100"),
        (["--model_dir", "x", "--out_dir", "y", "--n", "0"], "--n 0: expected at least 1"),
        (["--problems", "missing.jsonl", "--reference"], "missing.jsonl: no such file"),
        (["--limit", "0", "--reference"], "--limit"),
        (["--timeout", "0", "--reference"], "--timeout"),
        (["--model_dir", "x", "--out_dir", "y", "--k", "-1"], "--k"),
    ],
)
def test_eval_bad_arguments(here, arguments, message):
    r = here("eval_codegen.py", *arguments)
    assert r.returncode == 2
    assert message in r.stderr


def test_eval_tests_that_do_not_parse(run, jsonl):
    problems = jsonl("p.jsonl", [TASKS[0], {**TASKS[1], "tests": "assert two( == 2"}])
    r = run("eval_codegen.py", "--reference", "--problems", problems)
    assert r.returncode == 2
    assert "problem b:1: tests: expected Python with asserts" in r.stderr
    r = run("eval_codegen.py", "--reference", "--problems", jsonl("q.jsonl", [{"prompt": "x"}]))
    assert r.returncode == 2
    assert "problem 1: field 'tests' is missing or empty" in r.stderr
    r = run("eval_codegen.py", "--reference", "--problems", jsonl("r.jsonl", [{"prompt": "x", "tests": "assert 1"}]))
    assert r.returncode == 2
    assert "problem 1: field 'solution' is missing" in r.stderr


@pytest.mark.parametrize(
    ("tests", "run"),
    [
        ("assert f(1) == 1", True),
        ("def check(f):\n    assert f(1) == 1\ncheck(f)", True),
        ("for i in range(3):\n    assert f(i) == i", True),
        ("if f(1) != 1:\n    raise ValueError", True),
        (UNITTEST + "unittest.main()", True),
        ("# nothing", False),
        ("f(1)", False),
        ("def test_f():\n    assert f(1) == 1", False),
        (UNITTEST, False),
        ("return 1", False),
    ],
)
def test_tests_that_any_code_passes_are_refused(tests, run):
    if run:
        assert parse_tests(tests, "t.py") == tests
    else:
        with pytest.raises(UserError, match=r"t\.py.*tests: expected"):
            parse_tests(tests, "t.py")


def test_both_forms_of_mbpp(jsonl):
    row = {"code": "def f():\n    return 1", "test_list": ["assert f() == 1"], "task_id": 7}
    rows = [{**row, "text": "One."}, {**row, "prompt": "One.", "test_imports": ["import math"]}]
    full, sanitized = read_tasks(jsonl("m.jsonl", rows))
    assert full["prompt"] == sanitized["prompt"] == "One.\nYour code should pass these tests:\nassert f() == 1"
    assert full["tests"].strip() == "assert f() == 1" and sanitized["tests"].strip() == "import math\nassert f() == 1"


# infer_codegen.py


@pytest.fixture
def says(monkeypatch, capsys):
    """says([reply, ...], arguments) -> what infer_codegen.py does when the model says this: (code, stdout, stderr)."""

    def start(replies, tests=None):
        sampling = Sampling(len(replies), temperature=1.0, seed=1, batch_size=2)
        left = [{"plan": None, "code": extract_code(r), "reply": r, "tokens": 1, "seconds": 0.1} for r in replies]
        monkeypatch.setattr(infer_codegen, "sample", lambda m, t, prompts, *_, **__: [left.pop(0) for _ in prompts])
        returncode = 0
        try:
            infer_codegen.answer(None, None, "x", sampling, tests, False)
        except SystemExit as e:
            returncode = e.code
        return returncode, *capsys.readouterr()

    return start


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (FENCED, "import os\n\ndef one():\n    return 1"),
        ("def one():\n    return 1\n\nIt returns 1.", "def one():\n    return 1"),
        ("def one():\n    return (1 +", "def one():\n    return (1 +"),  # cut off by the limit of tokens
        ("def one():\n    x = 1\n    return x +", "def one():\n    x = 1\n    return x +"),
        ("Sure:\n```python\ndef one(", "def one("),
        ("import os\ndef one() return 1", "import os\ndef one() return 1"),
        ("print(1)", "print(1)"),
        ("    return 1", "    return 1"),
        ("I cannot.", ""),
        ("Sure", ""),
        ("from the list take one", ""),
        ("```python", ""),
        ("", ""),
    ],
)
def test_infer_prints_only_code_when_piped(says, reply, code):
    returncode, stdout, stderr = says([reply])
    assert (returncode, stdout) == ((0, f"{code}\n") if code else (1, ""))
    assert stderr.count("\n") == (not code) and ("no code in 1 of 1 replies" in stderr) == (not code)


def test_infer_numbers_samples_and_leaves_out_those_without_code(says):
    returncode, stdout, stderr = says(["x = f(1)", "I cannot.", "x = f(2)"])
    assert (returncode, stdout) == (0, "# sample 1 of 3\nx = f(1)\n# sample 3 of 3\nx = f(2)\n")
    assert "no code in 1 of 3 replies" in stderr


def test_infer_prints_the_first_that_passes(says):
    wrong, right, late = (f"```\ndef one():\n    return {x}\n```" for x in ("0", "1", "True"))
    returncode, stdout, stderr = says([wrong, "I cannot.", right, late], tests="assert one() == 1")
    assert (returncode, stdout) == (0, "def one():\n    return 1\n")
    assert [line.split(" ")[2] for line in stderr.splitlines()] == ["wrong", "syntax", "passed"]


def test_infer_prose_of_a_model(here, tiny):
    """A random model says no code: nothing is printed, --json shows what it said."""
    r = here("infer_codegen.py", "--model_dir", tiny, "--prompt", "Write one().", "--plan_then_code", *SMALL)
    assert (r.returncode, r.stdout) == (1, "")
    assert "no code in 1 of 1 replies" in r.stderr
    command = ["infer_codegen.py", "--model_dir", tiny, "--prompt", "Write one().", "--n", "3", "--json", *SMALL]
    r = here(*command)
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    assert r.returncode == 1 and len(rows) == 3
    assert all(set(row) == {"prompt", "plan", "code", "reply", "tokens", "seconds"} for row in rows)
    assert all(row["plan"] is None and 0 < row["tokens"] <= 6 and row["reply"] and not row["code"] for row in rows)
    assert [json.loads(x)["reply"] for x in here(*command).stdout.splitlines()] == [row["reply"] for row in rows]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (FENCED, "import os\n\ndef one():\n    return 1\n"),
        (FENCED[: FENCED.index("n 1")], "import os\n\ndef one():\n    retur\n"),
        ("```python\none()\n```\n", ""),  # the caller prints it at the end: a definition may have followed
        ("I cannot.", ""),
    ],
)
def test_screen_shows_code_alone(reply, shown, size):
    screen = Screen()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for start in range(0, len(reply), size):
            screen.reply(reply[start : start + size])
        screen.reply("", stream_end=True)
    assert out.getvalue() == shown
    assert screen.shown == bool(shown)


def test_infer_streams_to_a_terminal():
    """The embedded student on a terminal: the lines of its code come at different times, no fence among them."""
    screen, end = os.openpty()
    command = [sys.executable, ROOT / "infer_codegen.py", *ADD, "--max_new_tokens", "30"]
    process = subprocess.Popen(command, stdout=end, stderr=subprocess.DEVNULL)
    os.close(end)
    pieces = []
    with contextlib.suppress(OSError):  # how a pseudo-terminal says that the other side is gone
        while piece := os.read(screen, 4096):
            pieces.append((time.monotonic(), piece))
    os.close(screen)
    assert process.wait(timeout=60) == 0
    assert len(pieces) > 1 and pieces[-1][0] > pieces[0][0]
    shown = b"".join(piece for _, piece in pieces).decode().replace("\r", "")
    assert run_sandboxed(shown, "assert add(1, 2) == 3")["kind"] == "passed"


def test_infer_prints_code_without_fences_at_the_end_to_a_terminal(says, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert says(["def one():\n    return 1"]) == (0, "def one():\n    return 1\n", "")


def test_infer_with_tests_ends_with_1_when_no_sample_passes(run, tiny, tmp_path):
    tests = tmp_path / "test_one.py"
    tests.write_text("assert one() == 1\n")
    r = run("infer_codegen.py", "--model_dir", tiny, "--prompt", "Write one().", "--tests", tests, "--n", "3", *SMALL)
    assert r.returncode == 1
    assert r.stdout == ""
    assert "sandbox: " in r.stderr
    assert "no sample passes the tests: {" in r.stderr


def test_infer_with_tests_prints_what_the_embedded_student_can_do(here, tmp_path):
    tests = tmp_path / "test_add.py"
    tests.write_text("assert add(1, 2) == 3\nassert add(-1, 1) == 0\n")
    r = here("infer_codegen.py", *ADD, "--max_new_tokens", "30", "--tests", tests, "--json")
    assert r.returncode == 0, r.stderr
    assert "sample 1: passed" in r.stderr.splitlines()
    row = json.loads(r.stdout)
    assert row["verdict"]["kind"] == "passed" and row["code"].startswith("def add(") and "```" in row["reply"]


def test_infer_batch(here, tiny, jsonl, tmp_path):
    long = {"task_id": "long", "prompt": "word " * 2000}
    command = ["infer_codegen.py", "--model_dir", tiny, "--input", jsonl("in.jsonl", [*TASKS, long])]
    command += ["--output", tmp_path / "out.jsonl", "--n", "2", *SMALL]
    r = here(*command)
    assert r.returncode == 0, r.stderr
    rows = lines(tmp_path / "out.jsonl")
    assert [(row["task_id"], row["sample"]) for row in rows] == [(t, k) for t in ("a", "b", "long") for k in (0, 1)]
    assert all("verdict" in row for row in rows[:4])
    assert rows[4]["error"] == "prompt over the context"
    assert "6 samples for 3 prompts" in r.stderr
    assert "over the context: 2" in r.stderr
    assert not list(tmp_path.glob("*.part"))
    assert [row.get("solution") for row in rows] == [t.get("solution") for t in (*TASKS, long) for _ in (0, 1)]


def test_infer_reads_rows_from_standard_input_and_prints_them(here, tiny, monkeypatch):
    rows = [{"task_id": 7, "text": "One.", "code": "not ours", "test_list": ["assert one() == 1"], "source": "mine"}]
    stream = io.BytesIO(json.dumps(rows).encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    r = here("infer_codegen.py", "--model_dir", tiny, "--data", "-", "--out", "-", *SMALL)
    (row,) = map(json.loads, r.stdout.splitlines())
    assert (row["task_id"], row["source"], row["text"]) == ("7", "mine", "One.") and row["code"] != "not ours"
    assert "verdict" in row and f"warning: {tiny}: no adapter: code that it writes may run" in r.stderr
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"Write one().")))
    r = here("infer_codegen.py", "--model_dir", tiny, "--prompt", "-", "--json", *SMALL)
    assert json.loads(r.stdout)["prompt"] == "Write one()."


@pytest.mark.parametrize("asserts", [[], ["  "]])
def test_infer_refuses_mbpp_without_tests(here, jsonl, tmp_path, asserts):
    rows = [{"text": "One.", "test_list": ["assert f()"]}, {"text": "Two.", "test_list": asserts}]
    r = here("infer_codegen.py", "--model_dir", "x", "--input", jsonl("m.jsonl", rows), "--output", tmp_path / "o")
    assert r.returncode == 2
    assert r.stderr.endswith("m.jsonl: row 2: field 'test_list' is empty; expected asserts\n")
    assert read_tasks(jsonl("n.jsonl", [{"prompt": "x", "tests": " "}]))[0]["tests"] == ""  # no tests were meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "  "], "--prompt is empty"),
        ([], "expected --prompt TEXT, or --data FILE with --out FILE"),
        (["--prompt", "x", "--input", "y"], "expected --prompt TEXT, or --data"),
        (["--prompt", "x", "--tests", "missing.py"], "missing.py: no such file"),
        (["--prompt", "x", "--n", "3", "--temperature", "0"], "expected 0.01 to 100"),
        (["--prompt", "x", "--n", "0"], "--n 0: expected at least 1"),
        (["--prompt", "x", "--batch_size", "0"], "--batch_size 0: expected at least 1"),
        (["--prompt", os.fsdecode(b"caf\xe9")], r"argument 'caf\udce9': expected UTF-8"),
    ],
)
def test_infer_bad_arguments(here, arguments, message):
    r = here("infer_codegen.py", "--model_dir", "never_loaded", *arguments)
    assert r.returncode == 2
    assert message in r.stderr
    assert r.stderr.count("\n") == 1


@pytest.mark.parametrize("field", ["prompt", "tests", "task_id"])
def test_infer_refuses_rows_with_half_a_character(here, jsonl, tmp_path, field):
    row = {"prompt": "x", "tests": "assert f() == ''", field: "assert f() == '\ud800'"}
    r = here("infer_codegen.py", "--model_dir", "x", "--input", jsonl("m.jsonl", [row]), "--output", tmp_path / "o")
    assert r.returncode == 2
    assert f"field '{field}': expected Unicode text" in r.stderr
    assert r.stderr.count("\n") == 1


ESCAPES = "\x1b[2J\x9b2J\u202e"  # clear the screen, twice; write from right to left
SHOWN = r"\x1b[2J\x9b2J\u202e"


def test_printable():
    assert printable(ESCAPES) == SHOWN
    assert printable("a\rb\x07\n\té\ud800") == "a\\rb\\x07\n\té\\ud800"


def test_infer_prints_no_terminal_escapes(says, monkeypatch):
    """A pipe or file gets the code as it is, a terminal as a reader should see it."""
    reply = f"```python\ndef one():\n    return '{ESCAPES}é\t'\n```"
    code = f"def one():\n    return '{ESCAPES}é\t'\n"
    assert says([reply]) == (0, code, "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert says([reply]) == (0, code.replace(ESCAPES, SHOWN), "")
    assert says([reply] * 2)[1] == says([reply.replace(ESCAPES, SHOWN)] * 2)[1]
    assert says([reply], tests="assert one()")[1] == code.replace(ESCAPES, SHOWN)
    screen = Screen()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        screen.plan(f"1. {ESCAPES}")
        screen.reply(reply, stream_end=True)
    assert out.getvalue() == code.replace(ESCAPES, SHOWN)
    assert err.getvalue() == f"1. {SHOWN}"


def test_infer_prints_a_plan_without_terminal_escapes(capsys):
    infer_codegen.show({"plan": f"1. {ESCAPES}", "code": "x = 1"}, "x", "", None, as_json=False)
    assert capsys.readouterr() == ("x = 1\n", f"plan:\n1. {SHOWN}\n\n")


# The isolation that is required


@pytest.fixture
def weak(monkeypatch):
    monkeypatch.setattr(codegen_sandbox, "isolation", lambda: (False, False))


REFUSED = "error: sandbox: seccomp, rlimits (weak: other processes are reachable; files the user may write or read are"


@pytest.mark.parametrize(
    "command",
    [
        ("eval_codegen.py", "--reference"),
        ("eval_codegen.py", "--model_dir", "never_loaded", "--out_dir", "x"),
        ("infer_codegen.py", "--model_dir", "never_loaded", "--prompt", "x", "--tests", "TESTS"),
        ("codegen_prepare.py", "--out_dir", "never_written"),
    ],
)
def test_weak_isolation_is_refused(here, weak, tmp_path, command):
    tests = tmp_path / "t.py"
    tests.write_text("assert f()")
    command = [tests if word == "TESTS" else word for word in command]
    r = here(*command, "--require_isolation", "full")
    assert r.returncode == 2
    assert r.stderr.startswith(REFUSED)
    assert r.stderr.endswith("expected full isolation (--require_isolation any accepts this)\n")
    assert r.stderr.count("\n") == 1 and r.stdout == ""


@pytest.mark.parametrize(("uid", "level"), [(0, "full"), (1000, "any")])
def test_eval_requires_full_isolation_as_root(here, weak, monkeypatch, uid, level):
    monkeypatch.setattr(os, "getuid", lambda: uid)
    r = here("eval_codegen.py")  # without --model_dir, which is asked for later
    assert r.returncode == 2
    assert r.stderr.startswith(REFUSED if level == "full" else "error: expected --model_dir")
    assert r.stdout.startswith("sandbox: ") == (level == "any")
    r = here("eval_codegen.py", "--require_isolation", "any")
    assert r.stderr.startswith("error: expected --model_dir")


def test_infer_without_tests_runs_no_code_and_requires_nothing(here, weak):
    r = here("infer_codegen.py", "--model_dir", "never/loaded", "--prompt", "x", "--require_isolation", "full")
    assert "sandbox" not in r.stderr and "never/loaded" in r.stderr


def test_infer_tests_that_do_not_parse(run, tmp_path):
    tests = tmp_path / "t.py"
    tests.write_text("assert True\nassert (\n")
    r = run("infer_codegen.py", "--model_dir", "never_loaded", "--prompt", "x", "--tests", tests)
    assert r.returncode == 2
    assert "t.py:2: tests: expected Python with asserts" in r.stderr
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x", "tests": "assert ("}\n')
    r = run("infer_codegen.py", "--model_dir", "never_loaded", "--input", rows, "--output", tmp_path / "out.jsonl")
    assert r.returncode == 2
    assert "rows.jsonl: task 1:1: tests: expected Python with asserts" in r.stderr


def test_infer_prompt_over_the_context(here, tiny):
    r = here("infer_codegen.py", "--model_dir", tiny, "--prompt", "word " * 2000, *SMALL)
    assert r.returncode == 2
    assert "expected at most 1018, the context less 6 new ones" in r.stderr
