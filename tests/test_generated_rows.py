"""Rows that a teacher writes: lists in replies, near-duplicates, balance, cost, and the whole command on loopback."""

import hashlib
import json
import re
import runpy
from collections import Counter
from types import SimpleNamespace

import pytest
from teaching import endpoint, flags, lines

from common import Task
from distill.files import UserError
from distill.model.hub import base_config
from distill.tasks.near_duplicates import first_similar
from distill.train import generated_rows
from distill.train.generated_rows import Description, generate_data, generate_rows, texts_in, usable_rows
from distill.train.teacher_endpoint import Endpoint

TASK = Task("mood", ("glad", "sad"), "Is the writer glad or sad?\n\n{input}", ("", "N/A"))
EXAMPLES = ["The sun is out and so am I", "It rained on my picnic", "We won the cup", "My dog ran off", "Tea at last"]


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        ('["a b", "c \\"d\\""]', ["a b", 'c "d"']),
        ('Here you are:\n```json\n["one",\n "two"]\n```', ["one", "two"]),
        ('[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ('["one", "two", "thr', ["one", "two"]),  # the reply was cut
        ("Sure!\n1. one two\n2) three\n- four\nThat is all.", ["one two", "three", "four"]),
        ("I cannot do that.", []),
        ("", []),
        ("[1, 2]", []),
        ('["a \\x b", "\\u00e9t\\u00e9", "\\ud83d"]', ["été", "?"]),  # no escape of JSON; half a character
    ],
)
def test_what_a_reply_lists(reply, texts):
    assert texts_in(reply) == texts


def test_the_first_of_similar_texts_is_new_and_the_form_of_a_text_counts_little():
    texts = ["The parcel never came", "the parcel never came!", "My card was stolen", "The parcel never came."]
    assert first_similar(texts) == [None, 0, None, 0]
    assert first_similar(texts, ["my card was stolen."]) == [None, 1, 0, 1]
    assert first_similar([]) == []
    form = "Age: {}.0, Occupation: {}, Annual Income: {}.12, Payment Behaviour: {}"
    values = [(23, "Lawyer", 81234, "Low"), (57, "Teacher", 20411, "High"), (57, "Teacher", 20411, "High")]
    filled = [form.format(*v) for v in values] + [form.format(n, f"Job{n}", n * 991, "Low") for n in range(30, 36)]
    assert first_similar(filled)[:3] == [None, None, 1]
    many = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(600)]  # more than a block
    assert first_similar([*many, *many]) == [None] * 600 + list(range(600))


def test_inputs_are_filtered_and_balanced(tiny):
    description = Description(TASK, EXAMPLES, ["The bus left without me again"])
    texts = [
        ("glad", "I got the job"),
        ("glad", ""),
        ("glad", "we won the cup!"),  # an example
        ("sad", "the bus left without me again."),  # to be evaluated on
        ("sad", "I got the job."),
        ("sad", "word " * 90),
        ("glad", "Holidays begin tomorrow"),
        ("sad", "The cake burned"),
        ("glad", "A letter from an old friend"),
    ]
    rows, dropped = usable_rows(texts, description, 2, base_config(tiny)[2], 60)
    assert [(r["asked_label"], r["input"]) for r in rows] == [
        ("glad", TASK.prompt("I got the job")),
        ("glad", TASK.prompt("Holidays begin tomorrow")),
        ("sad", TASK.prompt("The cake burned")),
    ]
    assert dropped == {
        "empty": 1,
        "longer than 60 tokens": 1,
        "like a row to evaluate on": 1,
        "like an example or another input": 2,
    }


def writer(prompt, times):
    """A teacher that writes different inputs, some bad, and labels by their last word."""
    wanted = re.search(r"right answer is (\w+)", prompt)
    if not wanted:
        return "glad" if "happy" in prompt else "It is hard to say" if "puzzled" in prompt else "sad"
    number, label = int(re.search(r"request (\d+)", prompt)[1]), wanted[1]
    if label == "sad" and number == 1:
        return "I would rather not."
    own = [invented(label, number, i) for i in range(9)]
    return json.dumps([*own, own[0]]) if number % 2 else "\n".join(f"{i}. {t}" for i, t in enumerate(own, 1))


def invented(label, number, i):
    own = hashlib.sha256(f"{label} {number} {i}".encode()).hexdigest()
    return f"{own[:8]} {own[8:16]} {'happy' if label == 'glad' else 'gloomy' if number % 2 else 'puzzled'}"


def test_requests_go_on_until_there_are_enough_and_a_stopped_run_asks_for_the_rest(tiny, tmp_path, capsys):
    description, tokenizer = Description(TASK, EXAMPLES, []), base_config(tiny)[2]
    generate = lambda url, n=30, **more: generate_rows(  # noqa: E731
        Endpoint(url, "big", price_in=1.0, price_out=2.0, **more), n, description, tokenizer,
        folder=tmp_path, max_len=200, seed=1,
    )  # fmt: skip
    with endpoint(writer) as server:
        rows, record = generate(server.url)
        assert Counter(r["asked_label"] for r in rows) == {"glad": 15, "sad": 15} == record["rows"]
        assert record["requests"] == 5 == len(server.seen)  # two for each label, and one more in place of a refusal
        assert record["dropped"]["replies without a list of inputs"] == 1
        assert server.seen[0][2]["temperature"] == 1.0 and record["cost"] > 0
        out = capsys.readouterr().out
        assert "4 requests: about" in out and "to label 30 rows afterwards: about" in out
        (stored,) = tmp_path.glob("inputs-*")
        whole = stored.read_text()
        assert generate(server.url) == (rows, record) and len(server.seen) == 5
        stored.write_text("".join(whole.splitlines(keepends=True)[:3]))
        again, _ = generate(server.url)
        assert again == rows and len(server.seen) == 7
        with pytest.raises(UserError, match=r"--max_cost 0\.0001: expected more"):
            generate(server.url, n=300, max_cost=0.0001)
    with endpoint(lambda *_: '["one input", "one input"]') as server:
        rows, record = generate(server.url)
        assert len(rows) == 1 and len(server.seen) == 12 and "fewer than 15 for some label" in capsys.readouterr().out


def test_nothing_is_used_before_somebody_looked(tiny, tmp_path, monkeypatch, capsys):
    description, tokenizer, data = Description(TASK, EXAMPLES, []), base_config(tiny)[2], tmp_path / "mood_kd.jsonl"

    def start(url, n=10, yes=False):
        limits = {"data": data, "max_len": 200, "seed": 1, "yes": yes}
        return generate_data(Endpoint(url, "big"), n, description, tokenizer, **limits)

    with endpoint(writer) as server:
        with pytest.raises(UserError, match="no terminal to ask whether these inputs are good; expected --yes"):
            start(server.url)
        assert capsys.readouterr().out.count(" happy") >= 5 and not data.exists()
        asked = len(server.seen)
        monkeypatch.setattr(generated_rows, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
        monkeypatch.setattr("builtins.input", lambda _: "n")
        with pytest.raises(UserError, match="kept, and not used"):
            start(server.url)
        monkeypatch.setattr("builtins.input", lambda _: "y")
        record = start(server.url)
        assert len(lines(data)) == 10 and len(server.seen) == asked
    assert start("http://127.0.0.1:1/v1", yes=True) == record  # written before: nothing is asked
    with pytest.raises(UserError, match="exists, and was generated with --generate 10; expected another --data"):
        start(server.url, n=12)
    (tmp_path / "mood_kd.generated.json").unlink()
    with pytest.raises(UserError, match="exists, and was not generated"):
        start(server.url)


def test_a_student_is_taught_from_a_description(tiny, jsonl, tmp_path, monkeypatch, capsys):
    TASK.save(tmp_path / "mood_task.json")
    examples = jsonl("examples.jsonl", [{"question": text} for text in EXAMPLES])
    test = tmp_path / "test.csv"
    test.write_text(f"question,answer\n{invented('glad', 1, 4)}!,glad\n")
    data = tmp_path / "mood_kd.jsonl"
    with endpoint(writer) as server:
        more = {"teacher": server.url, "teacher_model": "big", "generate": 30, "examples": examples, "exclude": test}
        command = ["kd_train.py", *flags(tiny, data, tmp_path / "a", **more)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as refused:
            runpy.run_path("kd_train.py", run_name="__main__")
        assert refused.value.code == 2 and capsys.readouterr().err.strip().endswith("expected --yes after a look")
        assert not data.exists() and not (tmp_path / "a").exists() and len(server.seen) == 5
        monkeypatch.setattr("sys.argv", [*command, "--yes"])
        runpy.run_path("kd_train.py", run_name="__main__")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["generated"]["rows"] == {"glad": 15, "sad": 15} and record["generated"]["labels"]["glad"] == 15
    assert record["generated"]["dropped"]["like a row to evaluate on"] == 1
    puzzled = record["rows_untaught"]["answers that are no label"]
    assert 0 < puzzled < 15 and record["generated"]["as_asked"] == 1
    assert record["task"] == "mood" and "taught" in capsys.readouterr().out
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"--exclude {test} --yes --" in card and "--batch_in" not in card and "False" not in card


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--generate", "4"], "a finished run stands here"),
        (["--generate", "4", "--overwrite", "--on_policy", "2"], "--on_policy: expected free text"),
        (["--generate", "4", "--save_dir", "new", "--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
        (["--generate", "4", "--batch_in", "none.jsonl"], "--generate writes new ones; expected only one"),
        (["--batch_in", "none.jsonl"], "none.jsonl: no such file"),
        ([], "--examples: it is for inputs that a teacher writes; expected --generate N too"),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_request(
    tiny, jsonl, tmp_path, monkeypatch, capsys, more, message
):
    TASK.save(tmp_path / "mood_task.json")
    (tmp_path / "a").mkdir()
    for name in ("adapter_model.safetensors", "run.json"):
        (tmp_path / "a" / name).write_text("{}")
    if more[:1] == ["--batch_in"]:
        jsonl("mood_kd.jsonl", [{"input": TASK.prompt(text), "teacher_output": "glad"} for text in EXAMPLES])
    else:
        more = [*more, "--examples", str(jsonl("examples.jsonl", [{"question": text} for text in EXAMPLES]))]
    before = sorted(tmp_path.rglob("*"))
    with endpoint(writer) as server:
        given = flags(tiny, tmp_path / "mood_kd.jsonl", tmp_path / "a", teacher=server.url, teacher_model="big")
        monkeypatch.setattr("sys.argv", ["kd_train.py", *given, *more])
        with pytest.raises(SystemExit) as refused:
            runpy.run_path("kd_train.py", run_name="__main__")
        assert not server.seen
    error = capsys.readouterr().err
    assert refused.value.code == 2 and message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "gradient-boosting"}, "--generate: expected --teacher http://host/v1, which writes the inputs"),
        ({"examples": None}, "--generate: expected --examples, a file with at least 5 inputs"),
        ({"task": None}, "--generate: expected a label task (--task)"),
        ({"rows": EXAMPLES[:4] * 2}, "4 different examples; expected at least 5"),
        ({"teacher_model": None}, "expected --teacher_model"),
    ],
)
def test_what_generation_needs(jsonl, tmp_path, change, message):
    from distill.train.generated_rows import read_description

    TASK.save(tmp_path / "mood_task.json")
    rows = change.get("rows", EXAMPLES)
    examples = jsonl("examples.jsonl", [{"question": text} for text in rows]) if "examples" not in change else None
    asked = None if "teacher" in change else Endpoint("http://127.0.0.1:1/v1", change.get("teacher_model", "big"))
    with pytest.raises(UserError, match=re.escape(message)):
        read_description(asked, None if "task" in change else tmp_path / "mood_task.json", examples, [])
