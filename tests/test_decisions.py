"""The decision protocol: typed questions about a text, over HTTP and in the scorer."""

import json
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from scipy.special import softmax
from serving import LONG, Server, rows
from teaching import cached, flags, lines
from transformers import AutoTokenizer

from common import LabelScorer, completion_ids, load_model, prompt_ids
from distill.serve.decision_prompt import NULL_STATES, content_text, decision_prompt, question_text
from distill.serve.errors import problem
from distill.serve.question_scorer import Branch, QuestionScorer
from distill.serve.systemone import confidence
from distill.train.teacher_endpoint import Endpoint
from distill.train.teachers import Teacher, teach
from serve_creditmix import app

MODELS = ("base", "sft", "kd", "dpo")
TEXT = rows(1)[0]
LABEL = {"type": "choice", "instructions": "Credit mix?", "criteria": {"Bad": None, "Good": None, "Standard": None}}
YOUNG = {"type": "noul", "instructions": "Is the customer younger than 30?"}
TEAM = {
    "type": "choice",
    "instructions": "Which team answers?",
    "criteria": {"Very good support": None, "Billing": "Payments and refunds", "Very good": None},
}
DEBT = {"type": "score", "instructions": "How large is the debt?", "criteria": ["small", {"size": "medium"}, "large"]}
PREDICATE = {"type": "predicate", "instructions": "x"}
QUESTIONS = {"label": LABEL, "young": YOUNG, "team": TEAM, "debt": DEBT}


@pytest.fixture(scope="module")
def folders(tiny, tiny_adapter):
    return {"BASE_MODEL": tiny, **{f"{name.upper()}_DIR": tiny_adapter(name) for name in MODELS[1:]}}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("log"), API_KEY="open sesame", PRECISION="fp32", **folders) as running:
        yield running


def ask(server, questions, state=TEXT, model="sft"):
    """The answers of /v1/systemone."""
    status, got, _ = server.request("POST", "/v1/systemone", {"model": model, "state": state, "questions": questions})
    assert status == 200, got
    assert got["model"] == model and list(got["answers"]) == list(questions)
    return got["answers"]


# Answers


@pytest.mark.parametrize("model", MODELS)
def test_the_models_own_task_is_answered_as_by_infer(server, model):
    want = server.infer(model, TEXT)[1]
    got = ask(server, QUESTIONS, model=model)["label"]
    assert list(got["probabilities"]) == list(LABEL["criteria"])  # in the order of the request
    assert got["probabilities"] == pytest.approx(want["probabilities"], abs=1e-3)
    assert got["choice"] == want["prediction"]
    assert got["x_calibration"] == ("null" if model == "base" else "fitted")
    fields = dict(part.split(": ") for part in TEXT.split(", "))
    assert numbers(ask(server, {"x": LABEL}, fields, model)["x"]) == pytest.approx(numbers(got), abs=1e-3)


def test_other_questions_are_answered_as_by_the_offline_scorer(server, folders):
    """Raw scores less the mean of the content-free prompts', of the documented prompt and nothing else."""
    model, tokenizer = load_model(folders["KD_DIR"], "fp32")
    got = ask(server, QUESTIONS, model="kd")
    shown = [("Billing", "Payments and refunds"), ("Very good", ""), ("Very good support", "")]
    text = question_text("Which team answers?", shown)
    scorer = LabelScorer(model, tokenizer, [name for name, _ in shown])
    raw, *null = scorer.score([decision_prompt(state, text) for state in (TEXT, *NULL_STATES)])
    want = dict(zip(scorer.labels, softmax(raw - np.mean(null, axis=0)), strict=True))
    assert got["team"]["probabilities"] == pytest.approx(want, abs=1e-3)
    assert got["team"]["x_calibration"] == "null" and len(set(want.values())) == 3
    text = question_text("How large is the debt?", [("0", "small"), ("1", "size: medium"), ("2", "large")])
    scorer = LabelScorer(model, tokenizer, "012")
    raw, *null = scorer.score([decision_prompt(state, text) for state in (TEXT, *NULL_STATES)])
    p = softmax(raw - np.mean(null, axis=0))
    assert list(got["debt"]["probabilities"].values()) == pytest.approx(p, abs=1e-3)
    assert got["debt"]["score"] == pytest.approx(p[1] + 2 * p[2], abs=1e-3)
    assert got["debt"]["legend"] == {"0": "small", "1": {"size": "medium"}, "2": "large"}


def test_company_and_order_change_nothing(server):
    together = ask(server, QUESTIONS)
    for name, question in QUESTIONS.items():
        assert numbers(ask(server, {name: question})[name]) == pytest.approx(numbers(together[name]), abs=1e-4)
    turned = {name: QUESTIONS[name] for name in reversed(QUESTIONS)}
    turned["team"] = TEAM | {"criteria": {name: TEAM["criteria"][name] for name in sorted(TEAM["criteria"])}}
    for name, answer in ask(server, turned).items():
        assert numbers(answer) == pytest.approx(numbers(together[name]), abs=1e-4)


def numbers(answer):
    """What an answer says, in an order of its own."""
    return dict(sorted(answer.get("probabilities", {"noul": answer.get("noul")}).items()))


def test_both_shapes_say_the_same_to_the_openai_client(server):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="open sesame", max_retries=0)
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve("kd").id == "kd"
    want = ask(server, QUESTIONS)
    choices = [{"value": name} for name in LABEL["criteria"]]
    levels = [{"label": "small"}, {"label": "size", "description": "medium"}, {"label": "large"}]
    got = client.decisions.create(
        model="sft",
        input=[{"role": "user", "content": [{"type": "input_text", "text": TEXT}]}],
        questions=[
            {"type": "choice", "name": "label", "instructions": "Credit mix?", "choices": choices},
            {"type": "predicate", "instructions": YOUNG["instructions"]},
            {"type": "score", "instructions": DEBT["instructions"], "levels": levels},
            {"type": "choice", "instructions": "True?", "choices": [{"value": True}, {"value": False}]},
        ],
    )
    label, young, debt, true = got.answers
    assert {one.value: one.probability for one in label.probabilities} == pytest.approx(
        want["label"]["probabilities"], abs=1e-3
    )
    assert (label.name, label.choice, label.x_calibration) == ("label", want["label"]["choice"], "fitted")
    assert young.name is None and young.probability == pytest.approx(want["young"]["noul"], abs=1e-4)
    assert debt.score == pytest.approx(want["debt"]["score"], abs=1e-4)
    assert [one.label for one in debt.probabilities] == ["small", "size", "large"]
    assert true.choice in (True, False) and isinstance(true.choice, bool)
    assert got.usage.total_tokens == got.usage.input_tokens > 100
    with pytest.raises(openai.NotFoundError, match="expected one of base, sft, kd, dpo"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.BadRequestError, match="Input should be 'base'"):
        client.decisions.create(model="gpt", input="x", questions=[{"type": "predicate", "instructions": "x"}])


def test_ten_questions_are_one_pass_and_a_hundred_a_few(server):
    def passes(n):
        before = server.metric("serve_batch_rows_count"), server.metric("serve_batch_rows_sum")
        asked = {str(i): {"type": "noul", "instructions": f"Is it {i}?" + " Or not?" * (i % 8)} for i in range(n)}
        answers = ask(server, asked, model="base")
        return server.metric("serve_batch_rows_count") - before[0], answers

    assert passes(10)[0] == 1
    count, answers = passes(100)
    assert 1 < count < 5
    alone = ask(server, {"96": {"type": "noul", "instructions": "Is it 96?"}}, model="base")
    assert answers["96"]["noul"] == pytest.approx(alone["96"]["noul"], abs=1e-4)


# The server as a teacher


@pytest.mark.parametrize("api", ["systemone", "decisions"])
def test_the_server_teaches_what_infer_answers(server, task, tiny, tmp_path, monkeypatch, api):
    monkeypatch.setenv("OPENAI_API_KEY", "open sesame")
    url = f"http://127.0.0.1:{server.port}/v1"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    asked = [{"input": task.prompt(text)} for text in rows(8)]
    teacher = Teacher(url, endpoint=Endpoint(url, "kd", api=api))
    taught, _ = teach(teacher, asked, task, tokenizer, data=tmp_path / "c_kd.jsonl", max_len=1024, seed=0)
    for row, want in zip(taught, server.infer("kd", rows(8))[1], strict=True):
        assert row["teacher_probs"] == pytest.approx(want["probabilities"], abs=1e-3)
        assert row["teacher_output"] == want["prediction"]


def test_kd_train_learns_from_a_served_adapter(server, run, tiny, task, jsonl, tmp_path):
    task.save(tmp_path / "creditmix_task.json")
    texts = rows(12)
    asked = [{"input": task.prompt(text), "group": str(i)} for i, text in enumerate(texts)]
    data = jsonl("creditmix_kd.jsonl", asked)
    teacher = {"teacher": f"http://127.0.0.1:{server.port}/v1", "teacher_model": "sft", "teacher_api": "systemone"}
    env = {"OPENAI_API_KEY": "open sesame"}
    done = run("kd_train.py", *flags(tiny, data, tmp_path / "student", **teacher), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "student" / "run.json").read_text())["loss"] == "label distribution"
    (answers,) = cached(data, "answers")
    stored = {one["prompt"]: one["probabilities"] for one in lines(answers)}
    assert len(stored) == 12
    for text, want in zip(texts, server.infer("sft", texts)[1], strict=True):
        assert stored[task.prompt(text)] == pytest.approx(want["probabilities"], abs=1e-3)


# What is refused, and how


def body(model="sft", state="x", **question):
    return {
        "model": model,
        "state": state,
        "questions": {"q": {"type": "choice", "criteria": {"a": None, "b": None}} | question},
    }


@pytest.mark.parametrize(
    ("request_body", "status", "said"),
    [
        (body(model="gpt"), 422, "Input should be 'base', 'sft', 'kd' or 'dpo'"),
        (body(state=" \n"), 422, "expected text"),
        (body(state={}), 422, "expected text"),
        (body(state=3), 422, "valid string"),
        (body(state="\ud800"), 422, "lone surrogates"),
        (body(state={"a": ["\ud800"]}), 422, "lone surrogates"),
        (body(criteria={"\udc00": None, "b": None}), 422, "lone surrogates"),
        (json.dumps(body(state={"n": 9})).replace("9", "1e999").encode(), 422, "finite"),
        (body(state="7" * 3000), 413, "the state has"),
        (body(state="7" * 3000, criteria=LABEL["criteria"]), 413, "the state has"),
        (body(type="box"), 422, "does not match any of the expected tags: 'noul', 'choice', 'score'"),
        (body(criteria={"a": None}), 422, "at least 2 items"),
        (body(criteria={"a": None, " a": None}), 422, "options that differ"),
        (body(criteria={"a": None, " ": None}), 422, "not empty"),
        (body(criteria={"a": None, "b<|im_end|>": None}), 422, "the end of a turn"),
        (body(criteria={str(i): None for i in range(256)}), 422, "at most 255 items"),
        (body(criteria={f"{i} {LONG}": None for i in range(2)}), 413, "questions.q: "),
        (body(type="noul"), 422, "instructions or criteria"),
        (body(type="score", criteria=["a"]), 422, "at least 2 items"),
        (body(type="score", criteria=["a", "a"]), 422, "options that differ"),
        (body(type="score", criteria={"0": "a", "1": "b"}), 422, "valid list"),
        (body() | {"questions": {}}, 422, "at least 1 item"),
        (body() | {"images": ["data:,"]}, 422, "should be None"),
        (b'{"model": "sft", "state": "x", "questions": {"q": {}, "q": {}}}', 422, "different keys"),
        (json.dumps(body(state={"n": 9})).replace("9", "NaN").encode(), 422, "finite"),
        (b'{"model": "sft"', 422, "JSON decode error"),
        (b"[" * 100_000, 400, "parsing the body"),
        (body(state="x" * 300_000), 413, "at most 262144 bytes"),
    ],
)  # fmt: skip
def test_a_bad_request_is_named(server, request_body, status, said):
    got = server.request("POST", "/v1/systemone", request_body)
    assert got[0] == status and said in json.dumps(got[1])
    if status == 422:
        assert all(set(one) == {"loc", "msg", "type"} and one["loc"][0] == "body" for one in got[1]["detail"])
    else:
        assert set(got[1]["detail"]) == {"error_type", "message"}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 400, "model"),
        ({"input": ""}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, "input"),
        ({"input": "7" * 3000}, 413, None),
        ({"questions": [{"type": "predicate", "name": "\ud800", "instructions": "x"}]}, 400, None),
        ({"questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}] * 2}]}, 400, "questions.0"),
        ({"questions": [{"type": "noul", "instructions": "x"}]}, 400, "questions.0"),
        ({"questions": [{"type": "predicate", "instructions": ""}]}, 400, "questions.0"),
    ],
)
def test_errors_of_decisions_have_openais_shape(server, change, status, param):
    asked = {"model": "sft", "input": "x", "questions": [PREDICATE]}
    got = server.request("POST", "/v1/decisions", asked | change)
    assert got[0] == status and set(got[1]["error"]) == {"message", "type", "param", "code"}
    found = got[1]["error"]["param"]
    assert found is None if param is None else found.startswith(param)
    assert got[1]["error"]["message"]
    assert (got[1]["error"]["code"] == "model_not_found") == (param == "model")
    assert server.request("GET", "/v1/decisions")[:2] == (405, problem("/v1/decisions", 405, "Method Not Allowed"))


def test_broken_json_of_decisions_names_no_field(server):
    status, got, _ = server.request("POST", "/v1/decisions", b"{")
    want = {"message": "JSON decode error", "type": "invalid_request_error", "param": None, "code": None}
    assert (status, got) == (400, {"error": want})


@pytest.mark.parametrize(("path", "expected"), [("/v1/systemone", 422), ("/v1/decisions", 400)])
def test_a_body_of_another_content_type_is_malformed(server, path, expected):
    status, got, _ = server.request("POST", path, json.dumps(body()).encode(), {"Content-Type": "text/plain"})
    assert status == expected
    assert "valid dictionary" in (got["error"]["message"] if path == "/v1/decisions" else got["detail"][0]["msg"])


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/decisions"])
def test_a_fault_of_the_server_has_the_protocols_shape(monkeypatch, path):
    def fail(model):
        raise RuntimeError("secret")

    settings = SimpleNamespace(api_key=None, deadline=30, task=SimpleNamespace(labels=()))
    engine = SimpleNamespace(settings=settings, full=lambda: None, check=fail)
    monkeypatch.setattr(app.state, "engine", engine, raising=False)
    asked = {"/v1/systemone": body(), "/v1/decisions": {"model": "sft", "input": "x", "questions": [PREDICATE]}}
    got = TestClient(app, raise_server_exceptions=False).post(path, json=asked[path])
    assert got.status_code == 500 and got.json() == problem(path, 500, "internal error")


def test_a_key_is_read_from_either_header(server):
    for headers in ({"X-API-Key": "", "Authorization": "Bearer open sesame"}, {"X-API-Key": "open sesame"}):
        assert server.request("GET", "/v1/models", headers=headers)[0] == 200
    for path in ("/v1/systemone", "/v1/decisions"):
        wrong = {"X-API-Key": "", "Authorization": "Bearer wrong"}
        status, got, _ = server.request("POST", path, body(), wrong)
        assert (
            status == 401 and "authentication_error" in json.dumps(got) and "wrong" not in json.dumps(got).split(":")[0]
        )
    assert server.infer("sft", "x", headers={"X-API-Key": "", "Authorization": "Bearer open sesame"})[0] == 200


def test_questions_are_counted_and_their_texts_are_not_kept(server):
    name = 'serve_questions_total{calibration="null",model="dpo",type="choice"}'
    before = server.metric(name), server.metric('serve_requests_total{model="dpo",status="200"}')
    ask(server, {"z": TEAM | {"instructions": "Which zebra answers?"}}, model="dpo")
    assert server.metric(name) == before[0] + 1
    assert server.metric('serve_requests_total{model="dpo",status="200"}') == before[1] + 1
    log = server.log.read_text()
    assert "zebra" not in log and '"path": "/v1/systemone"' in log and "Very good support" not in log


def test_the_schemas_examples_work(server):
    kinds = server.request("GET", "/openapi.json")[1]["components"]["schemas"]
    for path, kind in (("/v1/systemone", "SystemOneRequest"), ("/v1/decisions", "DecisionsRequest")):
        assert server.request("POST", path, kinds[kind]["examples"][0])[0] == 200


# Parts


def test_the_prompt_is_the_documented_one():
    shown = sorted({"b": "second", "a": ""}.items())
    assert question_text("Which?", shown) == "Which?\nOptions:\n- a\n- b: second"
    assert question_text("", [("No", ""), ("Yes", "")]) == "Which of the options fits the text?\nOptions: No, Yes"
    assert decision_prompt("T", "Q") == "Answer the question about the text with one of its options.\n\nT\n\nQ"
    assert content_text({"Age": 23.0, "Job": None, "Own": True}) == "Age: 23.0, Job: N/A, Own: true"
    assert content_text([{"a": [1, "é"]}]) == '[{"a":[1,"é"]}]'
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="fewer levels"):
        content_text(nested)


def test_confidence_is_the_distance_from_chance():
    assert confidence([0.25] * 4) == 0 and confidence([0.0, 1.0]) == 1
    assert confidence([0.7, 0.2, 0.1]) == pytest.approx((0.7 - 1 / 3) / (2 / 3))


@pytest.fixture(scope="module")
def scorer(tiny):
    """The forward pass of the tiny model, its tokenizer and content-free prompts, and a count of its passes."""
    model, tokenizer = load_model(tiny, "fp32")
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))

    def null_prompts(text):
        return prompt_ids(tokenizer, [decision_prompt(state, text) for state in NULL_STATES])

    forward = LabelScorer(model, tokenizer, ["a", "b"]).forward
    return SimpleNamespace(forward=forward, null=null_prompts, tokenizer=tokenizer, passes=passes)


def row(scorer, n):
    """A text with n questions whose options have one to four tokens."""
    options = [ids[:-1] for ids in completion_ids(scorer.tokenizer, ["x"] * 3, ["No", "Very good", "Very bad indeed"])]
    prefix, *branches = prompt_ids(scorer.tokenizer, ["a text", *(f"Question {i}?" for i in range(n))])
    return prefix, [Branch(f"Question {i}?", ids, options) for i, ids in enumerate(branches)]


def test_a_prior_is_computed_once_and_the_oldest_forgotten(scorer, monkeypatch):
    monkeypatch.setattr("distill.serve.question_scorer.PRIORS", 12)
    questions = QuestionScorer(scorer.forward, scorer.null)
    asked = row(scorer, 10)
    first = questions.answers([asked])
    scorer.passes.clear()
    again = questions.answers([asked, row(scorer, 2)])
    assert len(scorer.passes) == 1 and len(questions.priors) == 10
    for (score, prior), (other, same) in zip(first[0], again[0], strict=True):
        assert score == pytest.approx(other, abs=1e-4) and (prior == same).all()
    questions.answers([row(scorer, 15)])
    assert len(questions.priors) == 12


def test_a_model_without_tree_masks_gives_the_same_scores(scorer, monkeypatch):
    questions = QuestionScorer(scorer.forward, scorer.null)
    asked = [row(scorer, 3), row(scorer, 1)]
    want = questions.scores(asked)
    monkeypatch.setattr(scorer.forward, "trees", False)
    monkeypatch.setattr("distill.model.label_forward.token_budget", lambda device: 64)  # several passes
    for one, other in zip(want, questions.scores(asked), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_questions_and_rows_of_the_task_have_passes_of_their_own():
    from distill.serve.engine import Engine, Row

    engine = Engine(None, lambda message: None)
    engine.budget, engine.window = 1000, 64
    branch = Branch("q", [1] * 5, [[1, 2], [3]])
    engine.models.served = {}
    engine._waiting = [
        Row(0, "sft", [0] * 20, 0.0),
        Row(1, "sft", [0] * 14, 0.0, [branch]),
        Row(2, "base", [0] * 20, 0.0),
        Row(3, "kd", [0] * 8, 0.0, [branch, branch]),
    ]
    assert [row.number for row in engine._choose()] == [0, 2]
    engine._waiting = engine._waiting[1:]
    assert engine._waiting[0].width == 20
    assert [row.number for row in engine._choose()] == [1, 3]


def test_what_waits_in_the_queue_is_refused_in_the_protocols_shape():
    assert problem("/v1/systemone", 503, "full") == {"detail": {"error_type": "overloaded_error", "message": "full"}}
    assert problem("/v1/decisions", 504, "late")["error"]["type"] == "api_error"
    assert problem("/infer/sft", 503, "full") == {"detail": "full"}
