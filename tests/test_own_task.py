"""A label task of one's own: rows in, what is lost and kept, and the whole road from a CSV to a served answer."""

import json
import os
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from serving import Server

import creditmix_prepare as prepare
from common import Task
from distill.evaluate import metrics
from distill.files import UserError, write_json
from distill.tasks.label_rows import default_balance, init_task, read_label_rows, read_test_rows, read_texts

COLUMNS = {"text": "question", "label": "type"}
TASK = Task("my", ("place", "time"), "Which? {input}", ("", "N/A"), COLUMNS)
TASK_FIELDS = {"name": "my", "template": "Which? {input}", "null_inputs": ["", "N/A"]}
WITH_GROUP = Task("my", ("place", "time"), "Which? {input}", ("",), {**COLUMNS, "group": "user"})


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- rows in


def test_csv_as_spreadsheets_write_it(tmp_path):
    text = '\ufeffid,question,type,user\r\n7,"Where, then?",place,ann\r\n8,"When\r\nis it?", time ,\r\n\r\n'
    text += '9,"Say ""now""",,ann\r\n'
    rows, dropped = read_label_rows(write(tmp_path / "my.csv", text), WITH_GROUP)
    assert rows == [
        {"question": "Where, then?", "answer": "place", "group": "ann"},
        {"question": "When\nis it?", "answer": "time", "group": "When\nis it?"},  # without a group, its own
        {"question": 'Say "now"', "answer": None, "group": "ann"},
    ]
    assert not dropped


def test_json_rows_may_name_their_fields_and_have_numbers_for_labels(tmp_path):
    lines = '{"question": "Where?", "type": 0, "user": 17}\n{"question": "When?", "type": null}\n{"question": "Why?"}\n'
    task = Task("n", ("0", "1"), "{input}", ("",), WITH_GROUP.columns)
    rows, _ = read_label_rows(write(tmp_path / "my.jsonl", lines), task)
    assert [(r["answer"], r["group"]) for r in rows] == [("0", "17"), (None, "When?"), (None, "Why?")]
    plain = Task("my", ("place", "time"), "{input}", ("",))  # without columns: question, answer, group
    rows, _ = read_label_rows(write(tmp_path / "my.json", '[{"question": "Where?", "answer": "place"}]'), plain)
    assert rows == [{"question": "Where?", "answer": "place", "group": "Where?"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,type\nx,place\n", "a.csv:1: no column 'question'; expected one of ['text', 'type']"),
        ("a.csv", "question;type\nx;place\n", "a.csv:1: no column 'question'; expected one of ['question;type']"),
        ("a.csv", "question,type\nx,place\n \t,time\n", "a.csv:3: field 'question': expected text that is not blank"),
        ("a.csv", 'question,type\n"x\ny",place\nz,when\n', "a.csv:4: field 'type': 'when' is no label; expected ('pl"),
        ("a.csv", "question,type\nx,place\ny,time,z\n", "a.csv:3: 3 fields; expected 2, as in the header"),
        ("a.csv", "question,type\nx\n", "a.csv:2: 1 fields; expected 2, as in the header"),
        ("a.csv", 'question,type\nx,"place\n', "a.csv:2: not CSV: unexpected end of data"),
        ("a.csv", "question,type\nx,place\ny\0,time\n", "a.csv:3: a NUL byte; expected UTF-8 text"),
        ("a.csv", "question,type,type\nx,place,time\n", "a.csv:1: column 'type' stands twice in the header"),
        ("a.csv", "question,type\n", "a.csv: no rows"),
        ("a.csv", "question,type\nx,place\n".encode("utf-16"), "a.csv: expected UTF-8 text; invalid byte at 0"),
        ("a.jsonl", '{"question": "x", "type": "place"}\n{"question": 3}\n', "a.jsonl:2: field 'question': expected a"),
        (
            "a.jsonl",
            '{"question": "x", "type": "place"}\n{"type": "place"}\n',
            "a.jsonl:2: field 'question' is missing",
        ),
        ("a.jsonl", '{"question": "x", "kind": "place"}\n', "a.jsonl: no row has the field 'type'; expected one of"),
        ("a.jsonl", '{"question": "x", "type": true}\n', "a.jsonl:1: field 'type': expected a valid string or a valid"),
    ],
)
def test_bad_rows_are_named_by_line_and_field(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        read_label_rows(write(tmp_path / name, content), TASK)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_texts_with_several_labels_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", "question,type\nx,place\ny,time\nx,time\nx,\nx,place\ny,time\n")
    rows, dropped = read_label_rows(path, TASK)
    assert [(r["question"], r["answer"]) for r in rows] == [("y", "time"), ("x", None), ("y", "time")]
    assert dropped == {f"several labels for one text, for example 'place' at {path}:2, 'time' at {path}:4": 3}


def test_rows_to_classify_keep_all_their_fields(tmp_path):
    path = write(tmp_path / "a.csv", "label,question\n7,Where?\n")  # a column like our own name for another
    assert read_texts(path, TASK) == ([{"label": "7", "question": "Where?"}], ["Where?"])
    only_text = Task("my", TASK.labels, "{input}", ("",), {"text": "question"})
    assert read_label_rows(path, only_text)[0] == [{"question": "Where?", "answer": None, "group": "Where?"}]
    with pytest.raises(UserError, match=r"a.csv:1: no column 'text'"):
        read_texts(path, Task("my", TASK.labels, "{input}", ("",), {"text": "text"}))


# --- the task file


def test_the_task_file_holds_the_labels_as_found_and_is_never_overwritten(tmp_path, capsys):
    src = write(tmp_path / "a.csv", "question,type\nx,time\ny,place\nz,time\nw,\n")
    init_task(tmp_path / "my_task.json", src, COLUMNS)
    question = "Which of these labels fits the text best: place, time? Answer with the label alone."
    assert json.loads((tmp_path / "my_task.json").read_text()) == {
        "name": "my",
        "labels": ["place", "time"],
        "template": question + "\n\n{input}",
        "null_inputs": ["", "N/A", "[MASK]"],
        "columns": COLUMNS,
    }
    printed = capsys.readouterr().out
    assert "labels place (1 rows), time (2 rows)" in printed and "Worth editing" in printed
    assert Task.load(tmp_path / "my_task.json").columns == COLUMNS
    (tmp_path / "my_task.json").write_text("edited")
    init_task(tmp_path / "my_task.json", src, COLUMNS)
    assert (tmp_path / "my_task.json").read_text() == "edited"
    assert "exists and is kept" in capsys.readouterr().out


def test_a_column_that_holds_no_labels_makes_no_task_file(tmp_path):
    one = write(tmp_path / "one.csv", "question,type\nx,time\ny,time\n")
    free = write(tmp_path / "free.csv", "question,type\n" + "".join(f"x{i},label {i}\n" for i in range(30)))
    for src, message in ((one, "['time']; expected at least two"), (free, "30 different values in 30 rows; expected")):
        with pytest.raises(UserError) as error:
            init_task(tmp_path / "t.json", src, COLUMNS)
        assert message in str(error.value)
    with pytest.raises(UserError, match="expected --text_column and --label_column"):
        init_task(tmp_path / "t.json", one, {"text": "question"})
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        (
            "t",
            "question,type\nx,a\ny,b\n",
            {**COLUMNS, "group": "type"},
            "field 'columns': expected one for the text, and",
        ),
        ("t", "question,type\nx,{input}\ny,b\n", COLUMNS, "field 'template': expected {input} exactly once"),
        ("t", 'question,type\nx,"two\nlines"\ny,b\n', COLUMNS, "expected different labels of one line"),
        ("", "question,type\nx,a\ny,b\n", COLUMNS, "expected NAME_task.json with a name of your own"),
        ("creditmix", "question,type\nx,a\ny,b\n", COLUMNS, "expected NAME_task.json with a name of your own"),
    ],
)
def test_a_task_that_could_not_be_read_again_is_not_written(tmp_path, name, content, columns, message):
    src = write(tmp_path / "a.csv", content)
    with pytest.raises(UserError) as error:
        init_task(tmp_path / f"{name}_task.json", src, columns)
    assert message in str(error.value) and not (tmp_path / f"{name}_task.json").exists()


def test_labels_that_look_the_same_are_refused():
    with pytest.raises(UserError, match="field 'labels': expected different labels of one line"):
        Task.parse("my_task.json", {**TASK_FIELDS, "labels": ["caf\u00e9", "cafe\u0301"]})  # an accent of its own


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_a_label_that_cannot_be_an_answer_is_named_with_its_task_file(tiny, tmp_path, monkeypatch, capsys, route):
    task = Task.parse("my_task.json", {**TASK_FIELDS, "labels": ["place", "time<|im_end|>"]})
    task.save(tmp_path / "my_task.json")
    row = {"input": "Which? x", "output": "place", "teacher_output": "place"}  # none of the rows has the label
    row |= {"prompt": row["input"], "chosen": "place", "rejected": task.labels[1]} if route == "dpo" else {}
    data = write(tmp_path / f"my_{route}.jsonl", json.dumps(row) + "\n")
    command = [f"{route}_train.py", "--student", tiny, "--data", data, "--save_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    expected = f"error: {tmp_path}/my_task.json: field 'labels': answer 'time<|im_end|>' to 'x': contains <|im_end|>,"
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(expected) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_task_file_beside_the_rows_is_reported_before_anything_is_written(tmp_path):
    src = write(
        tmp_path / "a.csv", "question,type\n" + "".join(f"x{i},{'time' if i % 2 else 'place'}\n" for i in range(9))
    )
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "my_task.json", "{")
    with pytest.raises(UserError, match="not JSON"):
        prepare.prepare(src, tmp_path / "out", TASK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my_task.json"]


def test_columns_are_part_of_the_file_not_of_the_task(tmp_path):
    assert Task("my", TASK.labels, TASK.template, TASK.null_inputs) == TASK
    write_json(tmp_path / "t.json", {"name": "my", "labels": ["a", "b"], "template": "{input}", "null_inputs": [""]})
    assert Task.load(tmp_path / "t.json").columns == {}
    bad = {"name": "my", "labels": ["a", "b"], "template": "{input}", "null_inputs": [""], "columns": {"txt": "x"}}
    write_json(tmp_path / "t.json", bad)
    with pytest.raises(UserError, match="field 'columns': expected 'text', 'label' or 'group', got 'txt'"):
        Task.load(tmp_path / "t.json")
    for columns in ({"label": "x"}, {"text": "x", "label": "x"}):
        write_json(tmp_path / "t.json", bad | {"columns": columns})
        with pytest.raises(UserError, match="field 'columns': expected one for the text, and different ones"):
            Task.load(tmp_path / "t.json")


# --- no row lost in silence


def labelled(folder, places, times, unlabelled=0):
    """A CSV of so many rows of each label and without one."""
    rows = [f"Where is number {i}?,place" for i in range(places)] + [f"When was {i}?,time" for i in range(times)]
    rows += [f"What about {i}?," for i in range(unlabelled)]
    return write(folder / "my.csv", "\n".join(["question,type", *rows, ""]))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_is_thrown_away_unless_it_is_asked_for(tmp_path, capsys):
    src = labelled(tmp_path, 80, 20)
    assert (default_balance(TASK), default_balance(Task("creditmix", ("a", "b"), "{input}", ("",)))) == (
        "none",
        "smallest",
    )
    prepare.prepare(src, tmp_path, TASK, task_path="my.json", val_frac=0.2)
    written = len(lines(tmp_path / "my_sft.jsonl"))
    assert written == json.loads((tmp_path / "my_split.json").read_text())["counts"]["training"]["rows"]
    printed = capsys.readouterr().out
    assert "balance:" not in printed
    assert f"next: python sft_train.py --data {tmp_path}/my_sft.jsonl --save_dir runs/my_sft " in printed
    evaluation = f"python eval_creditmix.py --model_dir runs/my_sft --data {src} --task my.json --val_frac 0.2\n"
    assert evaluation in printed
    prepare.prepare(src, tmp_path, TASK, val_frac=0.2, balance="smallest")
    kept = len(lines(tmp_path / "my_sft.jsonl"))
    assert f"balance: {kept} of {written} rows kept" in capsys.readouterr().out and kept < written / 2
    prepare.prepare(src, tmp_path, TASK, val_frac=0)  # all of them, with a test file of its own
    assert len(lines(tmp_path / "my_sft.jsonl")) == 100
    assert "--val_frac 0 --test FILE\n" in capsys.readouterr().out


def test_rows_without_a_label_wait_for_a_teacher(tmp_path, capsys):
    prepare.prepare(labelled(tmp_path, 20, 20, 30), tmp_path, TASK)
    kd = lines(tmp_path / "my_kd.jsonl")
    waiting = [r for r in kd if "teacher_output" not in r]
    assert 10 < len(waiting) < 30 and all(r["input"].startswith("Which? What about") for r in waiting)
    gold = [r for r in kd if "teacher_output" in r]
    assert all(r["teacher_output"] == r["output"] for r in gold)
    assert len(gold) == len(lines(tmp_path / "my_sft.jsonl"))
    assert f"{len(waiting)} training rows have no label" in capsys.readouterr().out
    counts = json.loads((tmp_path / "my_split.json").read_text())["counts"]
    assert counts["read"]["without label"] == 30 and counts["training"]["without label"] == len(waiting)

    prepare.prepare(labelled(tmp_path, 0, 0, 30), tmp_path, TASK)  # and with no label at all
    assert not (tmp_path / "my_sft.jsonl").exists() and not (tmp_path / "my_dpo.jsonl").exists()
    assert all(set(r) == {"input", "group"} for r in lines(tmp_path / "my_kd.jsonl"))
    assert "next: python kd_train.py --data" in capsys.readouterr().out


def test_classes_without_rows_are_named_and_one_class_alone_is_refused(tmp_path, capsys):
    src, rare = labelled(tmp_path, 40, 40), Task("my", ("place", "time", "way"), "{input}", ("",), COLUMNS)
    write(src, src.read_text() + "How?,way\n")  # falls on one side
    prepare.prepare(src, tmp_path, rare)
    printed = capsys.readouterr().out
    assert ("no held-out row is 'way'" in printed) != ("no training row is 'way'" in printed)
    with pytest.raises(UserError, match="training side: all rows have the label 'place'; expected at least two"):
        prepare.prepare(labelled(tmp_path, 40, 0), tmp_path, TASK)


def test_macro_f1_is_over_the_classes_that_have_rows():
    y, task = np.array([0, 0, 1, 1]), Task("t", ("a", "b", "c"), "{input}", ("",))
    scores = np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]))
    found = metrics(scores, y, np.arange(4), task)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)  # a: recall 1/2, precision 1; b: both 1


def test_a_test_file_that_repeats_training_rows_is_refused(tmp_path):
    path = write(tmp_path / "test.csv", "question,type\nx,place\nnew,time\n")
    train = [{"question": "x", "answer": "place", "group": "x"}]
    with pytest.raises(UserError, match=r"test.csv: 1 of its 2 texts are training rows of my.csv, for example 'x'"):
        read_test_rows(path, TASK, "six", "my.csv", train, allow_overlap=False)
    assert len(read_test_rows(path, TASK, "six", "my.csv", train, allow_overlap=True)[0]) == 2


# --- the whole road


def shell(command, *more, stdin=None):
    """A command as prepare prints it, with more flags; its output. It must succeed."""
    command = [sys.executable, *shlex.split(command)[1:], *map(str, more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, input=stdin, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


def test_from_a_csv_to_a_served_answer(tiny, tmp_path, monkeypatch, capsys):
    """Every command is one that the stage before printed, with the tiny student and fewer steps."""
    src = labelled(tmp_path, 60, 50, 10)
    task = tmp_path / "my_task.json"
    flags = "--text_column question --label_column type --init_task --val_frac 0.2"
    printed = shell(f"python creditmix_prepare.py --src {src} --task {task} --outdir {tmp_path} {flags}")
    train, evaluate = (line.removeprefix("next:").split("#")[0] for line in printed.splitlines()[-2:])
    adapter, report = tmp_path / "adapter", tmp_path / "report"
    short = ("--student", tiny, "--max_steps", 2, "--batch_size", 8, "--dev_rows", 8, "--lr", 0.01)
    shell(train, "--save_dir", adapter, *short)
    out = shell(evaluate, "--model_dir", adapter, "--out", report)
    assert "accuracy [95%]" in out and "tfidf_logistic_regression" in out
    found = json.loads((report / "report.json").read_text())
    assert found["labels_from"] == "gold" and found["overlap"] == 0

    def again(*flags):  # in this process: a subprocess spends most of its time on imports
        monkeypatch.setattr(
            sys, "argv", [*shlex.split(evaluate)[1:], "--model_dir", str(adapter), "--out", str(report)]
        )
        sys.argv += map(str, flags)
        runpy.run_path(str(ROOT / "eval_creditmix.py"), run_name="__main__")
        return capsys.readouterr().out

    test = write(tmp_path / "test.csv", "question,type\n" + "".join(f"Where is {i} now?,place\n" for i in range(6)))
    out = again("--test", test)
    assert "no held-out row is time" in out and json.loads((report / "report.json").read_text())["n"] == 6
    unlabelled = write(tmp_path / "new.csv", "id,question,type\n1,Where?,\n2,When?,\n3,Why?,\n")
    out = again("--test", unlabelled, "--teacher", tiny)
    assert f"this is agreement with the teacher {tiny}" in out and "agreement [95%]" in out and "accuracy" not in out

    renamed = tmp_path / "renamed_task.json"  # these rows have another name for the text
    write_json(renamed, json.loads(task.read_text()) | {"columns": {"text": "query"}})
    infer = f"python infer_creditmix.py --model_dir {adapter} --task {renamed} --input - --output -"
    answers = [json.loads(line) for line in shell(infer, stdin="id,query\n1,Where?\n2,When?\n3,Why?\n").splitlines()]
    assert [(a["id"], a["query"], a["prediction"] in ("place", "time")) for a in answers] == [
        ("1", "Where?", True),
        ("2", "When?", True),
        ("3", "Why?", True),
    ]
    with Server(tmp_path, BASE_MODEL=tiny, SFT_DIR=adapter, TASK=task) as server:
        status, served, _ = server.infer("sft", "Where?")
    assert status == 200 and served["prediction"] == answers[0]["prediction"]
