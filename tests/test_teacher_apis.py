"""An endpoint that gives label probabilities, what a teacher costs, and files for the Batch API."""

import json
import math
import random

import pytest
from teaching import cached, endpoint, flags, lines

from common import row_hash
from distill.files import UserError, write_jsonl
from distill.model.hub import base_config
from distill.train import teacher_batch
from distill.train.teacher_apis import APIS, ChatLogprobs, Position, input_text, label_mass
from distill.train.teacher_endpoint import Endpoint
from distill.train.teachers import Teacher, check_teacher, teach, write_requests


@pytest.fixture
def rows(task):
    return [{"input": task.prompt(f"Age: {i}.0"), "group": str(i)} for i in range(24)]


@pytest.fixture
def student(tiny):
    return base_config(tiny)[2]


def position(*alternatives):
    """A position whose reply took the first of the (token, probability) pairs."""
    listed = [{"token": token, "logprob": math.log(p)} for token, p in alternatives]
    return Position.model_validate({**listed[0], "top_logprobs": listed})


def chat(text, positions=None, usage=None):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if positions is not None:
        choice["logprobs"] = {"content": [p.model_dump() for p in positions]}
    return {"choices": [choice], "usage": usage}


# ---------------------------------------------------------------------------------------------------------------------
# Label probabilities


def test_label_mass_by_hand():
    labels = ("Good", "Standard", "Bad")
    # upper and lower case, a space and quotes are the same label; a token that no label begins with is none
    mass, shared = label_mass(
        [position(("Good", 0.5), (" good", 0.1), ('"B', 0.2), ("St", 0.1), ("The", 0.05))], labels, True
    )
    assert mass == pytest.approx({"Good": 0.6, "Standard": 0.1, "Bad": 0.2}) and shared == {}
    # white space decides nothing: the next position does, times the probability of getting there
    mass, shared = label_mass(
        [position(("\n", 0.8), ("Bad", 0.2)), position(("Good", 0.75), ("Bad", 0.25))], labels, True
    )
    assert mass == pytest.approx({"Good": 0.6, "Standard": 0.0, "Bad": 0.4}) and shared == {}


def test_label_mass_follows_the_reply_where_labels_begin_alike_and_shares_the_rest():
    labels = ("Very Good", "Very Bad", "Fair")
    positions = [position(("Very", 0.6), ("V", 0.1), ("F", 0.3)), position((" Bad", 0.7), (" Good", 0.3))]
    mass, shared = label_mass(positions, labels, True)
    assert mass == pytest.approx({"Very Good": 0.18, "Very Bad": 0.42, "Fair": 0.3})
    assert shared == pytest.approx({("Very Good", "Very Bad"): 0.1})


def test_label_mass_of_a_label_that_begins_another():
    labels = ("Good", "Good enough")
    mass, _ = label_mass(
        [position(("Good", 1.0)), position((" enough", 0.6), ("<|im_end|>", 0.3), (".", 0.1))], labels, True
    )
    assert mass == pytest.approx({"Good": 0.4, "Good enough": 0.6})
    mass, shared = label_mass([position(("Good", 0.9), ("Bad", 0.1))], labels, True)  # the reply ends there
    assert mass == pytest.approx({"Good": 0.9, "Good enough": 0.0}) and shared == {}
    mass, shared = label_mass([position(("Bad", 0.8), ("Good", 0.2))], labels, True)  # how it would go on is unknown
    assert mass == {"Good": 0.0, "Good enough": 0.0} and shared == pytest.approx({labels: 0.2})


def test_the_label_may_follow_a_preamble_and_needs_half_of_the_probability(task):
    protocol = ChatLogprobs("m", task, 1024)
    start = [position(("Answer", 0.9)), position((":", 1.0))]
    answer = protocol.read(chat("Answer: Bad", [*start, position((" Bad", 0.6), (" Good", 0.2))]))
    assert answer.probabilities == pytest.approx({"Good": 0.25, "Standard": 0.0, "Bad": 0.75})
    answer = protocol.read(chat("Bad", [position(("Bad", 0.3), ("I", 0.29), ("Good", 0.1))]))
    assert answer.probabilities is None and answer.text == "Bad"
    assert protocol.read(chat("", [])).probabilities is None


def logprobs(prompt, task):
    return chat("Good", [position(("Good", 0.7), ("good", 0.1), ("Bad", 0.1), ("I", 0.1))])


def systemone(prompt, task):
    answer = {"type": "choice", "choice": "Good", "probabilities": {"Bad": 0.2, "Good": 0.8, "Standard": 0.0}}
    return {"model": "m", "answers": {"label": answer}, "usage": {"input_tokens": 30, "output_tokens": 0}}


def decisions(prompt, task):
    options = [{"value": label, "probability": p} for label, p in (("Standard", 0.0), ("Good", 0.8), ("Bad", 0.2))]
    answer = {"type": "choice", "name": "label", "choice": "Good", "confidence": 0.5, "probabilities": options}
    return {"answers": [answer], "usage": {"input_tokens": 30, "output_tokens": 0, "total_tokens": 30}}


@pytest.mark.parametrize(
    ("api", "reply", "expected"),
    [
        ("logprobs", logprobs, {"Good": 8 / 9, "Standard": 0.0, "Bad": 1 / 9}),
        ("systemone", systemone, {"Good": 0.8, "Standard": 0.0, "Bad": 0.2}),
        ("decisions", decisions, {"Good": 0.8, "Standard": 0.0, "Bad": 0.2}),
    ],
)
def test_an_endpoint_teaches_probabilities_and_a_second_run_asks_nothing(
    task, student, rows, tmp_path, capsys, api, reply, expected
):
    rows[3] |= {"teacher_output": "Bad"}
    where = {"data": tmp_path / "creditmix_kd.jsonl", "max_len": 200, "seed": 0}
    with endpoint(
        lambda prompt, times: (500, {}, b"oops") if times == 1 and "9.0" in prompt else reply(prompt, task)
    ) as server:
        teacher = Teacher(server.url, endpoint=Endpoint(server.url, "m", api=api))
        check_teacher(teacher, "smollm2-135m", task)
        taught, record = teach(teacher, [dict(r) for r in rows], task, student, **where)
        assert len(server.asked) == 23 and sum(server.asked.values()) == 25  # "9.0" and "19.0" twice
        path, _, body = server.seen[0]
        assert path == f"/v1{APIS[api].path}" and body["model"] == "m"
    assert record["rows_untaught"] == {} and len(taught) == 24 and "teacher_probs" not in taught[3]
    for row in (row for i, row in enumerate(taught) if i != 3):
        assert row["teacher_output"] == "Good" and row["teacher_probs"] == pytest.approx(expected)
    if api == "logprobs":
        assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["temperature"] == 0
    else:  # asked about the text itself, as /infer is
        text = body["state" if api == "systemone" else "input"]
        assert text.startswith("Age: ") and "Classify" not in text
        assert record["teacher_usage"] == {"input_tokens": 690, "output_tokens": 0, "cost": None}
    if api == "systemone":
        instructions = "Classify the customer's credit mix as Good, Standard or Bad. Answer with one word."
        criteria = {"Good": None, "Standard": None, "Bad": None}
        assert body["questions"] == {"label": {"type": "choice", "instructions": instructions, "criteria": criteria}}
    again, _ = teach(teacher, [dict(r) for r in rows], task, student, **where)  # the server is gone
    assert [r.get("teacher_probs") for r in again] == [r.get("teacher_probs") for r in taught]
    assert "0 of them are not in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("api", "reply", "message"),
    [
        ("logprobs", chat("Good"), "no choices[0].logprobs.content"),
        ("systemone", {"answers": {"label": {"probabilities": {"Good": 1.0}}}}, "no answers.label.probabilities"),
        ("systemone", {"answers": {"label": {"noul": 0.3}}}, "no answers.label.probabilities"),
        ("decisions", {"answers": []}, "no answers[0].probabilities of the labels"),
    ],
)
def test_a_reply_without_label_probabilities_is_named(monkeypatch, task, student, rows, tmp_path, api, reply, message):
    monkeypatch.setattr("distill.train.teacher_endpoint.ATTEMPTS", 1)
    with endpoint(lambda *_: reply) as server:
        teacher = Teacher(server.url, endpoint=Endpoint(server.url, "m", api=api))
        with pytest.raises(UserError) as e:
            teach(teacher, rows, task, student, data=tmp_path / "c_kd.jsonl", max_len=200, seed=0)
    assert f"{server.url}{APIS[api].path}: status 200, but {message}" in str(e.value) and "\n" not in str(e.value)


def test_a_question_that_is_not_answered_is_counted_and_not_trained_on(task, student, rows, tmp_path):
    for api, empty in (("systemone", {"answers": {}}), ("decisions", {"answers": [{"type": "refusal"}]})):
        with endpoint(
            lambda p, _, api=api, empty=empty: (
                empty if "7.0" in p else {"systemone": systemone, "decisions": decisions}[api](p, task)
            )
        ) as server:
            teacher = Teacher(server.url, endpoint=Endpoint(server.url, "m", api=api))
            copies = [dict(r) for r in rows]
            taught, record = teach(teacher, copies, task, student, data=tmp_path / "c_kd.jsonl", max_len=200, seed=0)
        assert len(taught) == 22 and record["rows_untaught"] == {"answers that are no label": 2}


def test_labels_that_the_tokens_do_not_tell_apart_are_named(task, student, rows, tmp_path, capsys):
    from dataclasses import replace

    alike = replace(task, labels=("Very Good", "Very Bad", "Fair"))
    with endpoint(lambda *_: chat("Fair", [position(("Fair", 0.75), ("Very", 0.25))])) as server:
        teacher = Teacher(server.url, endpoint=Endpoint(server.url, "m", api="logprobs"))
        taught, _ = teach(teacher, rows, alike, student, data=tmp_path / "c_kd.jsonl", max_len=200, seed=0)
    assert taught[0]["teacher_probs"] == pytest.approx({"Very Good": 0.125, "Very Bad": 0.125, "Fair": 0.75})
    message = (
        "25.00% of the probability is on tokens that several labels begin with, divided among them: Very Good, Very Bad"
    )
    assert message in capsys.readouterr().out


def test_probabilities_of_an_endpoint_train_the_label_distribution(run, tiny, task, rows, jsonl, tmp_path):
    task.save(tmp_path / "creditmix_task.json")
    data = jsonl("creditmix_kd.jsonl", rows)
    with endpoint(lambda prompt, _: systemone(prompt, task)) as server:
        more = {"teacher": server.url, "teacher_model": "m", "teacher_api": "systemone", "dev_rows": 2}
        prices = {"price_in": 0.5, "price_out": 1}
        done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", **more, **prices))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["loss"] == "label distribution"
    assert record["teacher_usage"] == {"input_tokens": 720, "output_tokens": 0, "cost": pytest.approx(720 * 0.5e-6)}
    assert "24 requests: about " in done.stdout and "; they cost about " in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What a teacher costs


def text_rows(n):
    return [{"input": f"question {i}", "group": str(i)} for i in range(n)]


def priced(url, **more):
    return Teacher(url, endpoint=Endpoint(url, "m", price_in=1000, price_out=10_000, **more))


def test_the_cost_is_said_before_and_a_limit_below_it_asks_nothing(student, tmp_path, capsys):
    where = {"data": tmp_path / "notes_kd.jsonl", "max_len": 100, "seed": 0}
    tokens = sum(
        len(
            student.apply_chat_template([{"role": "user", "content": r["input"]}], add_generation_prompt=True)[
                "input_ids"
            ]
        )
        for r in text_rows(20)
    )
    with endpoint(lambda *_: "fine") as server:
        with pytest.raises(UserError) as e:
            teach(priced(server.url, max_cost=0.001), text_rows(20), None, student, **where)
        assert not server.seen
        said = f"20 requests: about {tokens} tokens in, by the student's tokenizer, and at most 2000 out; "
        said += f"they cost about {tokens / 1000:.4g} and at most 20"
        assert f"--max_cost 0.001: expected more, or fewer rows: {said}" in str(e.value)
        teach(priced(server.url), text_rows(20), None, student, **where)
        assert said in capsys.readouterr().out and len(server.seen) == 20


def test_the_limit_of_cost_ends_a_pass_by_the_reported_usage_and_counts_earlier_runs(student, tmp_path):
    usage = {"prompt_tokens": 100, "completion_tokens": 10}  # each answer costs 0.1 + 0.1, and might have cost above 1
    where = {"data": tmp_path / "notes_kd.jsonl", "max_len": 100, "seed": 0}

    def paid():
        return 0.2 * len(lines(cached(where["data"], "answers")[0]))

    with endpoint(lambda *_: chat("fine", usage=usage)) as server:
        for limit in (4.0, 6.0):
            with pytest.raises(UserError, match=f"--max_cost {limit:g}: .* spent, another request may exceed it") as e:
                teach(priced(server.url, max_cost=limit), text_rows(60), None, student, **where)
            assert limit - 1.1 < paid() <= limit and f"{paid():.4g} spent" in str(e.value)
        with pytest.raises(UserError, match=f"--max_cost 4: expected more, .* after {paid():.4g} for the answers"):
            teach(priced(server.url, max_cost=4.0), text_rows(60), None, student, **where)
        _, record = teach(priced(server.url, max_cost=100.0), text_rows(60), None, student, **where)
        assert set(server.asked.values()) == {1} and len(server.asked) == 60
    assert record["teacher_usage"] == {"input_tokens": 6000, "output_tokens": 600, "cost": pytest.approx(12.0)}


def test_an_endpoint_that_reports_no_usage_is_billed_as_if_its_answers_had_every_token(student, tmp_path):
    where = {"data": tmp_path / "notes_kd.jsonl", "max_len": 100, "seed": 0}
    with endpoint(lambda *_: "fine") as server, pytest.raises(UserError, match="--max_cost 3"):
        teach(priced(server.url, max_cost=3.0), text_rows(20), None, student, **where)
    assert len(server.seen) == 2  # at 1.03 each


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher_api": "logprobs"}, "--teacher_api logprobs: it gives label probabilities; expected a label task"),
        ({"max_cost": 3, "price_in": 1}, "--max_cost: expected --price_in and --price_out too"),
        ({"teacher": "gradient-boosting", "batch_out": "x.jsonl"}, "expected a label task"),
        ({"teacher": None, "batch_in": "x.jsonl"}, "expected --teacher http://host/v1, whose requests they hold"),
        ({"batch_in": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"max_cost": 0}, "invalid number above 0"),
    ],
)
def test_flags_of_a_teacher_that_do_not_fit_are_refused_in_one_line(run, tiny, jsonl, tmp_path, more, message):
    given = {"teacher_output": "x"} if "teacher" in more and more["teacher"] is None else {}
    data = jsonl("notes_kd.jsonl", [{**r, **given} for r in text_rows(3)])
    more = {"teacher": "http://127.0.0.1:9/v1", "teacher_model": "m", **more}
    done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", **{k: v for k, v in more.items() if v is not None}))
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Files for the Batch API


def results(requests, answer):
    """Results as the Batch API returns them, in another order than the requests."""
    found = [
        {"id": f"b{i}", "custom_id": r["custom_id"], "response": {"status_code": 200, "body": answer(r)}, "error": None}
        for i, r in enumerate(requests)
    ]
    random.Random(0).shuffle(found)
    return found


def test_a_batch_is_written_and_its_results_train(run, tiny, jsonl, tmp_path):
    data, url = jsonl("notes_kd.jsonl", text_rows(20)), "http://127.0.0.1:9/v1"  # nobody listens there
    more = {"teacher": url, "teacher_model": "big", "max_len": 100, "max_steps": 1, "dev_rows": 2}
    out = tmp_path / "requests.jsonl"
    done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", **more, price_in=1, price_out=2, batch_out=out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 requests: about" in done.stdout and "they cost about" in done.stdout and not (tmp_path / "a").exists()
    requests = lines(out)
    assert requests[4] == {
        "custom_id": row_hash("question 4"),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "big",
            "messages": [{"role": "user", "content": "question 4"}],
            "temperature": 0,
            "max_tokens": 100,
        },
    }
    usage = {"prompt_tokens": 9, "completion_tokens": 4}
    found = results(requests, lambda r: chat(f"re: {r['body']['messages'][0]['content']}", usage=usage))
    bad = [r["custom_id"] for r in requests[:3]]
    found = [r for r in found if r["custom_id"] not in bad]
    late = {"id": "x", "custom_id": bad[0], "response": None, "error": {"code": "batch_expired", "message": "too late"}}
    refused = {
        "custom_id": bad[1],
        "response": {"status_code": 400, "body": {"error": {"message": "no"}}},
        "error": None,
    }
    other = {"custom_id": "0" * 16, "response": {"status_code": 200, "body": chat("of other data")}, "error": None}
    one, two = jsonl("results.jsonl", [*found, other]), jsonl("errors.jsonl", [late, refused])
    args = [*flags(tiny, data, tmp_path / "b", **more), "--batch_in", one, two]
    done = run("kd_train.py", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "17 results of the batch; 1 are already stored or of other data" in done.stdout
    assert "1 failed: status None: 'too late'" in done.stdout and "1 failed: status 400: 'no'" in done.stdout
    record = json.loads((tmp_path / "b" / "run.json").read_text())
    assert record["rows_untaught"] == {"results that the batch does not have": 3}
    assert record["teacher_usage"]["input_tokens"] == 17 * 9 and record["trained"].startswith("re: question")
    done = run("kd_train.py", *flags(tiny, data, tmp_path / "c", **more, batch_out=out))  # the rest
    assert done.returncode == 0 and {r["custom_id"] for r in lines(out)} == set(bad), done.stderr[-2000:]


def test_label_probabilities_come_by_batch_too(task, student, rows, tmp_path):
    teacher = Teacher(
        "https://api.example.com/v1/", endpoint=Endpoint("https://api.example.com/v1/", "m", api="logprobs")
    )
    where = {"data": tmp_path / "creditmix_kd.jsonl", "max_len": 200}
    write_requests(teacher, rows, task, student, **where, path=tmp_path / "out.jsonl")
    requests = lines(tmp_path / "out.jsonl")
    assert requests[0]["url"] == "/v1/chat/completions" and requests[0]["body"]["logprobs"] is True
    write_jsonl(tmp_path / "in.jsonl", results(requests, lambda r: logprobs(r, task)))
    taught, _ = teach(teacher, rows, task, student, **where, seed=0, batch_in=[tmp_path / "in.jsonl"])
    assert len(taught) == 24 and taught[0]["teacher_probs"]["Good"] == pytest.approx(8 / 9)


def test_a_batch_over_the_limits_of_a_file_is_written_in_parts(monkeypatch, student, tmp_path):
    monkeypatch.setattr(teacher_batch, "MAX_REQUESTS", 8)
    teacher = priced("http://127.0.0.1:9/v1")
    where = {"data": tmp_path / "notes_kd.jsonl", "max_len": 100}
    write_requests(teacher, text_rows(20), None, student, **where, path=tmp_path / "out.jsonl")
    parts = [lines(tmp_path / name) for name in ("out.jsonl", "out-2.jsonl", "out-3.jsonl")]
    assert [len(p) for p in parts] == [8, 8, 4] and len({r["custom_id"] for p in parts for r in p}) == 20
    monkeypatch.setattr(teacher_batch, "MAX_BYTES", 500)
    write_requests(teacher, text_rows(6), None, student, **where, path=tmp_path / "small.jsonl")
    sizes = [p.stat().st_size for p in tmp_path.glob("small*.jsonl")]
    assert len(sizes) == 3 and max(sizes) <= 500


def test_a_file_of_requests_is_no_file_of_results(student, tmp_path):
    teacher, where = priced("http://127.0.0.1:9/v1"), {"data": tmp_path / "notes_kd.jsonl", "max_len": 100}
    write_requests(teacher, text_rows(3), None, student, **where, path=tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"out.jsonl: result 1: .* expected a result, not a request"):
        teach(teacher, text_rows(3), None, student, **where, seed=0, batch_in=[tmp_path / "out.jsonl"])


def test_the_text_of_a_prompt_is_what_the_template_was_given(task):
    assert input_text(task, task.prompt("Age: 30.0")) == "Age: 30.0"
    assert input_text(task, "another prompt") == "another prompt"
