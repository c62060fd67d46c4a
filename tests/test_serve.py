"""The server as a user starts it: a real process on loopback, a tiny random model with three adapters."""

import asyncio
import concurrent.futures
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from serving import LONG, ROOT, Server, rows

from common import Calibration, LabelScorer, answers, load_model

MODELS = ("base", "sft", "kd", "dpo")
FIELDS = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]


@pytest.fixture(scope="module")
def folders(tiny, tiny_adapter, tmp_path_factory):
    """Environment of a server with three adapters of its own, which a test may change."""
    home = tmp_path_factory.mktemp("served")
    for name in MODELS[1:]:
        shutil.copytree(tiny_adapter(name), home / name)
    return {"BASE_MODEL": tiny, **{f"{name.upper()}_DIR": home / name for name in MODELS[1:]}}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("log"), API_KEY="open sesame", **folders) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(tiny, tiny_adapter, tmp_path_factory):
    """A server with a short deadline and queue, one broken adapter, one missing and no key."""
    home = tmp_path_factory.mktemp("narrow")
    shutil.copytree(tiny_adapter("kd"), home / "kd")
    weights = home / "kd" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    env = {"SFT_DIR": tiny_adapter("sft"), "KD_DIR": home / "kd", "DPO_DIR": home / "dpo"}
    env["CLASS_PRIOR"] = json.dumps({"Good": 3, "Standard": 5, "Bad": 2})
    with Server(home, BASE_MODEL=tiny, DEADLINE=1, MAX_QUEUE=220, **env) as running:
        yield running


def offline(folder, task, texts, name):
    """What infer_creditmix.py computes for these texts."""
    model, tokenizer = load_model(folder, "fp32")
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    raw = scorer.score([task.prompt(text) for text in texts])
    return answers(task, raw, scorer.prior(task), Calibration.load(folder, task), name)


def same(a, b):
    """Two answers agree to 1e-3 in every number."""
    for field in FIELDS[2:6]:
        assert a[field] == pytest.approx(b[field], abs=1e-3)
    assert a["top2_margin"] == pytest.approx(b["top2_margin"], abs=1e-3)
    assert a["model_name"] == b["model_name"]


# Answers


def test_answers_are_those_of_infer(server, folders, task):
    texts = rows(5)
    for name in MODELS:
        folder = folders["BASE_MODEL" if name == "base" else f"{name.upper()}_DIR"]
        expected = offline(folder, task, texts, name)
        for text, want in zip(texts, expected, strict=True):
            status, got, _ = server.infer(name, text)
            assert (status, list(got)) == (200, FIELDS)
            same(got, want)
        status, got, _ = server.infer(name, texts)
        assert status == 200
        for one, want in zip(got, expected, strict=True):
            same(one, want)
    assert offline(folders["SFT_DIR"], task, texts[:1], "")[0] != offline(folders["KD_DIR"], task, texts[:1], "")[0]


def test_64_clients_over_four_models_get_their_own_answers(server):
    asked = [(MODELS[i % 4], text) for i, text in enumerate(rows(64))]
    alone = [server.infer(*one)[1] for one in asked]
    before = server.metric("serve_batch_rows_count"), server.metric("serve_batch_rows_sum")
    wrong = []

    def client(i):
        connection = server.connect()
        for k in range(4):
            model, text = asked[(i + 16 * k + k) % 64]
            status, got, _ = server.infer(model, text, connection=connection)
            assert status == 200
            same(got, alone[(i + 16 * k + k) % 64])
        connection.close()
        wrong.append(None)

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(client, i) for i in range(64)]:
            done.result()
    assert len(wrong) == 64
    batches = server.metric("serve_batch_rows_count") - before[0]
    assert server.metric("serve_batch_rows_sum") - before[1] == 256
    assert batches < 128  # rows of several clients shared a forward pass


def test_a_reload_takes_the_new_adapter_and_harms_nobody(server, folders, task):
    text = rows(1)[0]
    before = {name: server.infer(name, text)[1] for name in MODELS}
    stop, failures = threading.Event(), []

    def client(name):
        while not stop.is_set():
            status, got, _ = server.infer(name, text)
            if status != 200 or (name != "sft" and abs(got["top2_margin"] - before[name]["top2_margin"]) > 1e-3):
                failures.append((name, status, got))

    threads = [threading.Thread(target=client, args=(name,)) for name in MODELS for _ in range(2)]
    for thread in threads:
        thread.start()
    shutil.copytree(folders["DPO_DIR"], folders["SFT_DIR"], dirs_exist_ok=True)  # "retrained"
    answered = [server.request("POST", "/admin/reload", {"model": "sft"})]
    (folders["KD_DIR"] / "adapter_model.safetensors").write_bytes(b"half a file")
    answered.append(server.request("POST", "/admin/reload", {"model": "kd"}))
    stop.set()
    for thread in threads:
        thread.join(60)
    assert answered[0][:2] == (200, {"reloaded": "sft"})
    assert answered[1][0] == 409 and "kd: does not load" in answered[1][1]["detail"]
    assert not failures
    same(server.infer("sft", text)[1], {**before["dpo"], "model_name": "sft"})
    same(server.infer("kd", text)[1], before["kd"])
    assert server.request("GET", "/readyz")[1]["models"]["kd"]["state"] == "ready"


def test_another_task_is_served_without_code(tiny, tiny_adapter, tmp_path):
    """Adapters of another task or another base are refused by name; limits and exposure are those of the settings."""
    labels = ["Red", "Red wine", "Reddish", "Blue", "Ultramarine blue", "None of them"]
    path = tmp_path / "colours_task.json"
    template = "Which colour is meant?\n\n{input}"
    path.write_text(json.dumps({"name": "c", "labels": labels, "template": template, "null_inputs": ["N/A", ""]}))
    shutil.copytree(tiny_adapter("kd"), tmp_path / "kd")
    config = tmp_path / "kd" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "another/model"}))
    env = {"TASK": path, "SFT_DIR": tiny_adapter("sft"), "KD_DIR": tmp_path / "kd", "MAX_ROW_TOKENS": 100}
    uvicorn = [sys.executable, "-m", "uvicorn", "serve_creditmix:app", "--host", "0.0.0.0", "--port", "{port}"]
    with Server(tmp_path, command=uvicorn, BASE_MODEL=tiny, **env) as server:
        status, got, _ = server.infer("base", "the sky")
        assert status == 200 and list(got["probabilities"]) == labels
        assert sum(got["probabilities"].values()) == pytest.approx(1)
        report = server.request("GET", "/readyz")[1]
        assert (report["fields"], report["title"], report["max_row_tokens"]) == ([], "C", 100)
        assert report["models"]["dpo"]["state"] == "missing" and "runs/c_dpo" in report["models"]["dpo"]["detail"]
        status, got, _ = server.infer("base", ["the sky", "7" * 90])
        assert (
            status == 413 and "row 2 has" in got["detail"] and "expected at most 100 (MAX_ROW_TOKENS)" in got["detail"]
        )
        schema = server.request("GET", "/openapi.json")[1]
        assert schema["info"]["title"] == "C" and "100 tokens with the prompt (413)" in schema["info"]["description"]
        row = schema["components"]["schemas"]["Question"]["properties"]["features"]["examples"][0]
        assert server.infer("base", row)[0] == 200
        assert "listening on 0.0.0.0 without API_KEY" in server.log.read_text()
        assert "task.json: fields 'labels' and 'template'" in server.infer("sft", "x")[1]["detail"]
        assert "trained on another/model; expected" in server.infer("kd", "x")[1]["detail"]


# What is refused, and how


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"features": ""}, 422, "at least 1 character"),
        ({"features": "  \n"}, 422, "at least 1 character"),
        ({"feature": "x"}, 422, "Field required"),
        ({"features": 3}, 422, "valid string"),
        ({"features": "x", "label": "Good"}, 422, "Extra inputs"),
        ({"features": "x" * 4001}, 422, "at most 4000"),
        ({"features": "語" * 4000}, 413, "tokens with the prompt; expected at most"),
        (b'{"features": NaN}', 422, "valid string"),
        (b'{"features": "\\ud800"}', 422, "unicode"),
        (b'{"features": "x"', 422, "JSON decode error"),
        (b"[" * 100_000, 400, "parsing the body"),
        (b'{"features": "\xff"}', 400, "parsing the body"),
        (b"", 422, "Field required"),
        ({"features": "x" * 300_000}, 413, "at most 262144 bytes"),
    ],
)
def test_a_bad_body_is_named(server, body, status, said):
    got = server.request("POST", "/infer/sft", body)
    assert got[0] == status and said in json.dumps(got[1])
    assert '"input"' not in json.dumps(got[1])  # what was sent is not sent back


def test_lists_are_bounded(server):
    assert server.infer("sft", [])[0] == 422
    assert server.infer("sft", ["x"] * 257)[0] == 422
    assert server.infer("sft", ["x", ""])[0] == 422


def test_only_what_exists_is_there(server):
    status, got, _ = server.infer("gpt", "x")
    assert status == 422 and "'base', 'sft', 'kd' or 'dpo'" in got["detail"][0]["msg"]
    assert server.request("GET", "/infer/sft")[0] == 405
    assert server.request("POST", "/infer", {})[0] == 404
    assert server.request("GET", "/redoc")[0] == 404  # its scripts would come from elsewhere
    assert server.request("POST", "/infer/sft", b'{"features": "x"}', {"Content-Type": "text/plain"})[0] == 422


def test_a_key_is_asked_for(server):
    for headers in ({"X-API-Key": ""}, {"X-API-Key": "open sesam"}, {"X-API-Key": "open sesamé"}):
        assert server.infer("sft", "x", headers=headers)[0] == 401
        assert server.request("POST", "/admin/reload", {"model": "sft"}, headers)[0] == 401
    assert server.request("GET", "/healthz", headers={"X-API-Key": ""})[0] == 200


def test_other_origins_are_not_let_in(server):
    asked = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    assert server.request("OPTIONS", "/infer/sft", headers=asked)[0] == 405
    headers = server.infer("sft", "x", headers={"Origin": "http://elsewhere"})[2]
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_class_prior_is_served_and_reported(narrow, tiny_adapter, task):
    models = narrow.request("GET", "/readyz")[1]["models"]
    shares = {"Good": 0.3, "Standard": 0.5, "Bad": 0.2}
    assert models["sft"]["class_prior"] == models["base"]["class_prior"] == pytest.approx(shares)
    assert models["sft"]["natural_prior"] is None and models["dpo"]["class_prior"] is None
    (plain,) = offline(tiny_adapter("sft"), task, ["Age: 30.0"], "sft")
    got = narrow.infer("sft", "Age: 30.0")[1]
    odds = {label: p * shares[label] for label, p in plain["probabilities"].items()}
    expected = {label: p / sum(odds.values()) for label, p in odds.items()}
    assert got["probabilities"] == pytest.approx(expected, abs=1e-3)


def test_a_natural_prior_that_is_not_known_is_logged_and_leaves_the_model_serving(tiny_adapter, task):
    from types import SimpleNamespace

    from distill.serve.models import LabelModels

    logged = []
    models = LabelModels(SimpleNamespace(class_prior="natural"), lambda event, **fields: logged.append((event, fields)))
    own = Calibration.load(tiny_adapter("sft"), task)
    assert models._calibration(tiny_adapter("sft"), task) == own
    assert logged[0][0] == "class prior not applied" and "natural_shares" in logged[0][1]["detail"]


def test_broken_and_missing_adapters_leave_the_others_serving(narrow):
    status, report, _ = narrow.request("GET", "/readyz")
    states = {name: model["state"] for name, model in report["models"].items()}
    assert (status, states) == (200, {"base": "ready", "sft": "ready", "kd": "broken", "dpo": "missing"})
    assert report["models"]["sft"]["calibration"] == "fitted" and report["models"]["base"]["calibration"] == "null"
    assert narrow.infer("base", "x")[0] == narrow.infer("sft", "x")[0] == 200
    status, got, _ = narrow.infer("kd", "x")
    assert status == 503 and "kd: does not load" in got["detail"]
    status, got, _ = narrow.infer("dpo", "x")
    assert status == 404 and got["detail"].startswith("dpo: not trained")
    assert "python dpo_train.py --student" in got["detail"] and "--save_dir" in got["detail"]
    assert "without API_KEY" not in narrow.log.read_text()  # on loopback
    events = [json.loads(line) for line in narrow.log.read_text().splitlines() if line.startswith("{")]
    assert {e["model"]: e["state"] for e in events if e["event"] == "adapter not served"} == {
        "kd": "broken",
        "dpo": "missing",
    }
    assert narrow.request("POST", "/admin/reload", {"model": "kd"})[0] == 403  # no API_KEY, no operator


def test_an_adapter_that_is_refused_or_of_fewer_layers_harms_nobody(tiny, tiny_adapter, tmp_path):
    for name in ("sft", "kd"):
        shutil.copytree(tiny_adapter(name), tmp_path / name)
    rewrite(tmp_path / "sft", {}, lambda key, tensor: tensor * float("nan"))  # the first to load, and refused
    env = {"SFT_DIR": tmp_path / "sft", "KD_DIR": tmp_path / "kd", "DPO_DIR": tmp_path / "dpo"}
    with Server(tmp_path, BASE_MODEL=tiny, API_KEY="k", **env) as server:
        states = server.request("GET", "/readyz")[1]["models"]
        assert states["sft"]["state"] == "broken" and "not numbers" in states["sft"]["detail"]
        base = server.infer("base", "x")[1]
        rewrite(tmp_path / "kd", {"target_modules": ["q_proj"]}, lambda key, t: t if "q_proj" in key else None)
        assert server.request("POST", "/admin/reload", {"model": "kd"})[0] == 200
        status, narrower, _ = server.infer("kd", "x")
        assert status == 200
        for odd in ({"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}):
            before = rewrite(tmp_path / "kd", odd)
            status, said, _ = server.request("POST", "/admin/reload", {"model": "kd"})
            assert status == 409 and f"field '{next(iter(odd))}': expected plain LoRA" in said["detail"]
            rewrite(tmp_path / "kd", before)
        same(server.infer("kd", "x")[1], narrower)
        same(server.infer("base", "x")[1], base)


def rewrite(folder, fields, weights=None):
    """Change an adapter's config, and its weights to weights(name, tensor), None to drop one -> the config before."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | fields))
    if weights:
        path = folder / "adapter_model.safetensors"
        changed = {name: weights(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    return before


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (
            {"CLASS_PRIOR": '{"Good": 1}'},
            "environment: CLASS_PRIOR: class prior: expected an object with a number above",
        ),
        ({"DEADLINE": "soon"}, "environment: DEADLINE: expected a number above 0, got 'soon'"),
        ({"TASK": "nowhere.json"}, "nowhere.json: no such file"),
        ({"PRECISION": "int8"}, "environment: PRECISION: expected one of auto, nf4, bf16, fp32, got 'int8'"),
        ({"BASE_MODEL": "no/such-model"}, "no/such-model: neither a model folder nor"),
    ],
)
def test_a_server_that_cannot_start_says_so_in_one_line(run, env, said):
    done = run("serve_creditmix.py", "--port", "0", env=env)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1].startswith(f"error: {said}")


# Under pressure


def settle(server):
    """Until the server answers short rows again, and has learned that they are quick."""
    end, answered = time.monotonic() + 30, 0
    while answered < 20:
        assert time.monotonic() < end
        answered += server.infer("sft", "x")[0] == 200


def test_a_missed_deadline_and_a_full_queue_are_reported(narrow):
    settle(narrow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        late = pool.submit(narrow.infer, "sft", [LONG] * 200)
        while not narrow.metric("serve_queue_rows"):
            time.sleep(0.01)
        status, got, headers = narrow.infer("sft", [LONG] * 200)
        assert status == 503 and "queue is full" in got["detail"] and int(headers["Retry-After"]) >= 1
        assert late.result()[0] == 504
    settle(narrow)


def test_rows_of_a_client_that_left_are_cancelled(narrow):
    settle(narrow)
    before = narrow.metric("serve_batch_rows_sum")
    body = json.dumps({"features": [LONG] * 200}).encode()
    with socket.create_connection(("127.0.0.1", narrow.port)) as s:
        head = "POST /infer/sft/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        s.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        while not narrow.metric("serve_queue_rows"):
            time.sleep(0.01)
    end = time.monotonic() + 30
    while narrow.metric("serve_queue_rows") and time.monotonic() < end:
        time.sleep(0.05)
    assert narrow.metric('serve_rejections_total{reason="client gone"}') == 1
    assert narrow.metric("serve_batch_rows_sum") - before < 200


def row(number, tokens, model="sft"):
    from distill.serve.engine import Row

    return Row(number, model, [number] * tokens, 0.0)


def engine_with(sent, task, scorer):
    """An engine whose model is `scorer`; the messages that it sends are appended to `sent`."""
    from distill.serve.engine import Engine
    from distill.serve.models import ServedModel

    engine = Engine(None, sent.append)
    engine.models.scorer, engine.models.model = scorer, None
    scorer.forward = SimpleNamespace(prefix=[])
    engine.models.served = {"sft": ServedModel("ready", "", "sft-1", task, Calibration(), np.zeros(3))}
    engine.max_tokens = engine.budget = 100
    engine.window = 64
    return engine


def test_a_pass_takes_the_oldest_row_and_those_nearest_to_it_in_length():
    engine = engine_with([], None, Instant())
    engine._waiting = [row(i, n) for i, n in enumerate((100, 180, 90, 95, 101, 30))]
    engine._take({"cancel": [3]})  # nobody waits for it any more
    engine.budget, engine.window = 310, 5
    assert [len(r.ids) for r in engine._choose()] == [100, 101, 90]  # 3 x 101 tokens fit, 4 x 101 do not
    assert [len(r.ids) for r in engine._waiting] == [100, 180, 90, 101, 30]
    engine.budget, engine.window = 405, 4  # the last one is too young to overtake
    assert [len(r.ids) for r in engine._choose()] == [100, 101, 90]
    engine.budget = 50
    assert [len(r.ids) for r in engine._choose()] == [100]


def test_a_short_row_is_in_the_pass_after_the_running_one_whatever_the_list_that_waits():
    engine = engine_with([], None, Instant())
    engine.budget = 2048
    engine._take([row(i, 500) for i in range(62)])
    assert [r.number for r in engine._collect()] == [0, 1, 2, 3]
    engine._take([row(100, 60)])
    assert [r.number for r in engine._collect()] == [100]  # without long rows, which would make its pass a long one
    engine._take([row(200 + i, 500) for i in range(62)])
    passes = [[r.number // 100 for r in engine._collect()] for _ in range(4)]
    assert all({0, 2} <= set(own) for own in passes[1:])  # two lists share each pass


def test_admission_estimates_by_tokens_and_a_long_list_refuses_no_short_row():
    from distill.serve.client import EngineClient, Waiting

    client = EngineClient(SimpleNamespace(deadline=30, max_queue=512), None)
    client.seconds_per_token, client.pass_tokens = 0.005, 2048
    client.rows = {i: Waiting(None, 0, 440) for i in range(62)}  # 136 s of work
    client.tokens[0] = 62 * 440
    assert client.full(1, 60) is None and client.seconds_until(60) == pytest.approx((2048 + 60) * 0.005)
    assert client.full(62, 62 * 440).status_code == 503
    client.tokens.update(dict.fromkeys(range(1, 100), 60))
    assert client.seconds_until(60) == pytest.approx(101 * 60 * 0.005)  # each other request takes as much before it
    for number in range(62):
        client.remove(number)
    assert 0 not in client.tokens


def test_a_short_row_overtakes_a_list_of_long_ones(server):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = pool.submit(server.infer, "kd", [LONG] * 120)
        while server.metric("serve_queue_rows") < 100:
            time.sleep(0.01)
        assert server.infer("sft", "x")[0] == 200
        assert server.metric("serve_queue_rows") > 0 and not late.done()
        assert late.result()[0] == 200


def test_a_row_has_at_most_four_times_the_tokens_of_training_rows(tmp_path):
    from distill.serve.models import ROW_TOKENS, LabelModels, ServedModel, training_tokens

    found = []
    for record in ({"tokens": {"p95": 90, "longest": 130, "p99": 120}}, {"tokens": {"p95": 90, "longest": 130}}, {}):
        (tmp_path / "run.json").write_text(json.dumps(record))
        found.append(training_tokens(tmp_path))
    assert found == [120, 130, None] and training_tokens(tmp_path / "none") is None
    models = LabelModels(SimpleNamespace(max_row_tokens=None), None)
    models.context = 8000
    assert models.max_row_tokens == ROW_TOKENS
    models.served |= {"sft": ServedModel("ready", training_tokens=120), "kd": ServedModel("ready", training_tokens=100)}
    assert models.max_row_tokens == 480
    models.context = 300
    assert models.max_row_tokens == 300
    models.settings.max_row_tokens = 200.0
    assert models.max_row_tokens == 200


def test_an_address_that_others_reach_is_reported(caplog, monkeypatch):
    from distill.serve.limits import LOG, warn_if_exposed

    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level("INFO", "serve")
    with socket.create_server(("127.0.0.1", 0)):
        asyncio.run(warn_if_exposed())
        assert not caplog.messages
        with socket.create_server(("0.0.0.0", 0)):
            asyncio.run(warn_if_exposed())
    assert "listening on 0.0.0.0 without API_KEY" in caplog.messages[0]


def test_a_state_space_model_is_served(task, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    from distill.model.hub import embedded_student

    tokenizer = AutoTokenizer.from_pretrained(embedded_student())
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["in_proj", "x_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "sft")
    task.save(tmp_path / "sft" / "task.json")
    with Server(tmp_path, BASE_MODEL=tmp_path / "base", SFT_DIR=tmp_path / "sft") as server:
        for name, folder in (("base", "base"), ("sft", "sft")):
            for text, want in zip(rows(3), offline(tmp_path / folder, task, rows(3), name), strict=True):
                status, got, _ = server.infer(name, text)
                assert status == 200
                same(got, want)


def test_a_batch_without_room_is_answered_by_halves(task):
    import torch

    class Scorer:  # of a GPU with room for three rows, and for none of an id above 6
        def score_ids(self, ids, adapters):
            if len(ids) > 3 or max(map(max, ids)) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return np.array([[-own[0], -9.0, -9.0] for own in ids])

    sent = []
    engine = engine_with(sent, task, Scorer())
    engine._answer([row(i, 10) for i in range(8)])
    found = dict(pair for message in sent for pair in message.get("answers", ()))
    assert [found[i]["raw_scores"]["Good"] for i in range(7)] == [-i for i in range(7)]
    assert found[7] is None  # the one that is too large, and nobody else
    assert 10 < engine.budget < 11  # half of two rows of ten tokens, and one pass more
    before = engine.budget
    engine._answer([row(0, 10)])
    assert engine.budget == 1.01 * before  # and back, pass by pass


class Instant:
    def score_ids(self, ids, adapters):
        return -np.ones((len(ids), 3))


def test_idle_time_is_no_time_of_a_row(task):
    """A lone row whose client left in the middle of a pass leaves one message, followed by a long silence."""
    engine = engine_with([], task, Instant())
    engine.queue.put({"cancel": [0]})
    engine._answer([row(0, 10)])
    assert engine.busy_since
    threading.Timer(0.5, engine.queue.put, [[row(1, 10)]]).start()
    engine._answer(engine._collect())
    assert engine.seconds_per_token < 0.005


def test_a_gpu_that_answers_no_more_ends_the_process(task):
    import torch

    class Broken:
        def score_ids(self, ids, adapters):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        engine_with([], task, Broken())._answer([row(0, 10)])


def test_the_engine_ends_after_it_has_answered(task):
    sent = []
    engine = engine_with(sent, task, Instant())
    lines = [json.dumps(m) for m in ({"rows": [[i, "sft", [1] * 10] for i in range(25)]}, {"cancel": [3, 4]})]
    with pytest.raises(json.JSONDecodeError):
        engine.receive([*lines, '{"rows": [[25, "sft'])  # the other process was killed while it wrote
    engine.run()
    assert sent.pop(0) == {"cancelled": [3, 4]}
    assert sorted(n for message in sent for n, _ in message["answers"]) == [n for n in range(25) if n not in (3, 4)]


def test_what_would_come_too_late_is_refused_at_once(narrow):
    """A queue longer than the deadline would have the model compute what nobody waits for any more."""
    settle(narrow)
    end, statuses = time.monotonic() + 3, []

    def client(_):
        while time.monotonic() < end:
            statuses.append(narrow.infer("sft", [LONG] * 2)[0])
            time.sleep(0.02)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))
    assert set(statuses) <= {200, 503, 504}
    assert statuses.count(200) > statuses.count(504)


def test_sigterm_answers_what_was_accepted(narrow):
    settle(narrow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(narrow.infer, "sft", rows(8, i)) for i in range(4)]
        while not (accepted := narrow.metric("serve_queue_rows") / 8):
            time.sleep(0.002)
        narrow.process.send_signal(signal.SIGTERM)
        found = [one.result()[0] for one in asked if not one.exception()]
    assert found.count(200) >= accepted and set(found) <= {200, 503}, found  # what comes after the signal is refused
    assert narrow.process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(OSError):
        narrow.request("GET", "/healthz")


# Watching


def test_metrics_count_models_classes_and_rejections(server):
    name = 'serve_requests_total{model="dpo",status="200"}'
    before = server.metric(name), server.metric('serve_top2_margin_count{model="dpo"}')
    _, got, _ = server.infer("dpo", "Age: 40")
    counted = f'serve_predictions_total{{label="{got["prediction"]}",model="dpo"}}'
    label = server.metric(counted)
    server.infer("dpo", ["Age: 40", "Age: 40"])
    server.infer("dpo", "")
    assert server.metric(name) == before[0] + 2
    assert server.metric(counted) == label + 2
    assert server.metric('serve_top2_margin_count{model="dpo"}') == before[1] + 3
    assert server.metric('serve_rejections_total{reason="invalid"}') >= 1
    text = server.request("GET", "/metrics")[1]
    assert "serve_queue_rows 0.0" in text and 'serve_request_seconds_bucket{le="0.005",model="dpo"}' in text


def test_the_log_has_the_request_and_not_its_text(server):
    _, _, headers = server.infer("sft", "Occupation: Beekeeper", headers={"X-Request-ID": "order-66"})
    assert headers["X-Request-ID"] == "order-66"
    assert re.fullmatch("[0-9a-f]{32}", server.infer("sft", "x", headers={"X-Request-ID": "a b\tc"})[2]["X-Request-ID"])
    text = server.log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    line = next(line for line in lines if line.get("request_id") == "order-66")
    assert (line["path"], line["status"], line["rows"], line["client"]) == ("/infer/sft", 200, 1, "127.0.0.1")
    assert "Beekeeper" not in text and "open sesame" not in text and "Scientist" not in text


def test_openapi_has_examples_that_work(server):
    schema = server.request("GET", "/openapi.json")[1]
    assert {"/infer/{model}", "/infer/{model}/batch", "/admin/reload", "/healthz", "/readyz"} <= set(schema["paths"])
    assert all(
        part in schema["info"]["description"] for part in ("4000 characters", "256 rows", "262144 bytes", "30 s")
    )
    kinds = schema["components"]["schemas"]
    assert server.infer("sft", kinds["Question"]["properties"]["features"]["examples"][0])[0] == 200
    assert server.infer("sft", kinds["Questions"]["properties"]["features"]["examples"][0])[0] == 200
    assert list(kinds["Answer"]["properties"]) == FIELDS
    assert all("examples" in p for p in kinds["Answer"]["properties"].values())


# The page


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_pages_need_nothing_from_elsewhere(server, path):
    status, text, headers = server.request("GET", path, headers={"X-API-Key": ""})
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.findall(r"https?://|@import|src=|<link", text)


def test_the_page_in_a_browser(server, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    from browser import Browser

    address = f"http://127.0.0.1:{server.port}/"
    with Browser(chromium, tmp_path / "profile", address) as page:
        page.until("document.querySelectorAll('#models section').length === 4 && document.querySelector('[name=Age]')")
        assert page.run("document.querySelectorAll('#form input[name]').length") == 6
        assert page.run("document.title") == "Creditmix"
        page.run("document.querySelector('[name=Age]').value = '31'")
        page.run("document.querySelector('[name=Age]').dispatchEvent(new Event('input'))")
        line = page.run("document.getElementById('features').value")
        assert line.startswith("Age: 31, Occupation: Scientist, Annual Income: 19114.12")
        page.run("document.querySelector('#form button').click()")
        page.until("document.querySelectorAll('.problem').length === 4")
        assert "X-API-Key: missing or wrong" in page.run("document.getElementById('model-sft').textContent")
        page.run("document.getElementById('key').value = 'open sesame'")
        page.run("document.querySelector('#form button').click()")
        page.until("document.querySelectorAll('.answer').length === 4")
        for name in MODELS:
            want = server.infer(name, line)[1]
            card = f"document.getElementById('model-{name}')"
            assert page.run(f"{card}.querySelector('.answer').textContent") == want["prediction"]
            shown = page.run(f"[...{card}.querySelectorAll('.row span:last-child')].map(x => x.textContent)")
            assert shown == [f"{100 * p:.1f}%" for p in want["probabilities"].values()]
            assert page.run(f"{card}.querySelector('.margin').textContent") == f"margin {want['top2_margin']:.3f}"
            assert ("fitted" in page.run(f"{card}.querySelector('.calibration').textContent")) == (name != "base")
        command = page.run("document.querySelector('#model-kd button').dataset.curl")
        done = subprocess.run(
            ["bash", "-c", f"API_KEY='open sesame'; {command} -s"], capture_output=True, text=True, timeout=60
        )
        same(json.loads(done.stdout), server.infer("kd", line)[1])
        page.run("document.querySelector('#ask button').click()")
        page.until("document.querySelectorAll('#answers .answer').length === 3")
        shown = page.run("[...document.querySelectorAll('#answers section')].map(x => x.textContent)")
        said = ("calibration: fitted", "null prior only", "medium")
        assert all(part in text for part, text in zip(said, shown, strict=True))
        got = server.infer("sft", line)[1]["prediction"]
        assert page.run("document.querySelector('#answers .answer').textContent") == got
        page.run("document.getElementById('questions').value = 'Which? | a'")
        page.run("document.querySelector('#ask button').click()")
        page.until("document.querySelector('#answers .problem')")
        assert "at least 2 items" in page.run("document.getElementById('answers').textContent")
        page.screenshot(tmp_path / "serve_page.png")
        assert (tmp_path / "serve_page.png").stat().st_size > 10_000
        assert page.run("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
        page.go(address + "docs")
        page.until("document.title === 'Creditmix: API' && document.querySelectorAll('h2').length >= 8")
        assert "4000 characters per row" in page.run("document.body.textContent")


# Outgrowing one machine


@pytest.mark.extra("ray")
def test_two_replicas_on_ray_serve(tiny, tiny_adapter, tmp_path):
    command = [sys.executable, "serve_creditmix.py", "--replicas", "2"]
    env = {"SFT_DIR": tiny_adapter("sft"), "KD_DIR": tmp_path / "none", "RAY_USAGE_STATS_ENABLED": 0}
    with Server(tmp_path, ready=False, command=command, BASE_MODEL=tiny, **env) as server:
        server.wait(seconds=240)
        text, pids = rows(1)[0], set()
        first = server.infer("sft", text)[1]
        end = time.monotonic() + 60
        while len(pids) < 2 and time.monotonic() < end:
            status, got, _ = server.infer("sft", text)
            assert status == 200
            same(got, first)
            pids = set(re.findall(r"LabelServer pid=(\d+)", server.log.read_text()))
        assert len(pids) == 2
        assert server.infer("kd", text)[0] == 404
        assert server.infer("sft", "")[0] == 422


def test_the_command_line_help(run):
    done = run("serve_creditmix.py", "--help")
    assert done.returncode == 0 and "BASE_MODEL" in done.stdout
    assert str(ROOT) not in done.stdout
