"""The teachers of kd_train.py: endpoints on loopback, answers and log-probs that survive a kill, token-level KD."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from serving import Server
from teaching import cached, endpoint, flags, lines

from common import load_model, row_hash
from distill.files import UserError, write_jsonl
from distill.model.hub import base_config
from distill.train import teacher_endpoint, teachers
from distill.train.data import encode
from distill.train.teacher_answers import label_of
from distill.train.teacher_apis import LABEL_TOKENS, Chat
from distill.train.teacher_endpoint import Endpoint, ask_endpoint

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_an_answer_is_a_label_only_when_that_is_plain():
    labels = ("Good", "Very Good", "Bad", "a:b")
    plain = {"Good": "Good", " Bad\n": "Bad", "**good**.": "Good", "Credit mix: Very good!": "Very Good", "a:b": "a:b"}
    assert {text: label_of(text, labels) for text in plain} == plain
    none = ("", "not Bad", "Good or Bad", "The mix is Good", "Goods", "<think>Good", "Good\nBad", "excellent")
    assert [label_of(text, labels) for text in none] == [None] * len(none)
    assert label_of("YES", ("yes", "Yes")) is None  # two labels in small letters: which one is not plain


def test_an_endpoint_teaches_a_label_task_and_no_label_is_never_trained_on(run, tiny, task, jsonl, tmp_path):
    task.save(tmp_path / "creditmix_task.json")
    rows = [{"input": task.prompt(f"Age: {i}.0"), "group": str(i)} for i in range(24)]
    rows[5] |= {"teacher_output": "Bad"}
    data = jsonl("creditmix_kd.jsonl", rows)
    number = {r["input"]: i for i, r in enumerate(rows)}

    def reply(prompt, times):
        i = number[prompt]
        if i == 3 and times == 1:
            return 429, {"Retry-After": 1}, b"slow down"
        if i == 4 and times <= 2:
            return (500, {}, b"oops") if times == 1 else b"<html>not JSON</html>"
        return "It is hard to say \ud800" if i % 4 == 0 else ("Good", " good.\n", "Answer: Standard")[i % 3]

    more = {"teacher_model": "big", "dev_rows": 2, "max_steps": 5}
    with endpoint(reply) as server:
        args = flags(tiny, data, tmp_path / "a", teacher=server.url, **more)
        done = run("kd_train.py", *args, env={"OPENAI_API_KEY": "secret-key"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert sum(server.asked.values()) == 23 + 1 + 2 and server.asked[rows[5]["input"]] == 0
        path, key, body = server.seen[0]
        assert path == "/v1/chat/completions" and key == "Bearer secret-key"
        assert body["model"] == "big" and body["temperature"] == 0 and body["max_tokens"] == LABEL_TOKENS
    assert "taught 17 rows; 6 answers that are no label" in done.stdout and "It is hard to say" in done.stdout
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["rows_untaught"] == {"answers that are no label": 6} and record["loss"] == "sequence"
    trained = (tmp_path / "a" / "train_rows.txt").read_text().split()
    assert len(trained) > 10 and not {row_hash(rows[i]["input"]) for i in range(0, 24, 4)} & set(trained)
    assert "secret-key" not in done.stdout + done.stderr + json.dumps(record)
    (answers,) = cached(data, "answers")
    assert len(lines(answers)) == 23 and sum(a["text"].startswith("It is hard") for a in lines(answers)) == 6
    again = run("kd_train.py", *flags(tiny, data, tmp_path / "b", teacher=server.url, **more))  # the server is gone
    assert again.returncode == 0 and "0 of them are not in" in again.stdout, again.stderr[-2000:]


def test_an_endpoint_writes_free_text_and_what_is_cut_or_too_long_is_not_trained_on(run, tiny, jsonl, tmp_path):
    rows = [{"input": f"question {i}", "group": str(i)} for i in range(12)]
    data = jsonl("notes_kd.jsonl", [*rows, {"input": "word " * 200, "group": "x"}])
    with endpoint(
        lambda prompt, _: {"question 1": "half an <cut>", "question 2": " "}.get(prompt, f"re: {prompt}")
    ) as s:
        more = {"teacher": s.url, "teacher_model": "big", "max_len": 100, "max_steps": 1, "dev_rows": 2}
        done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", **more))
        assert len(s.asked) == 12  # the prompt over --max_len was not asked for
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["rows_untaught"] == {
        "longer than 100 tokens": 1,
        "answers that are empty or longer than --max_len": 2,
    }
    assert record["trained"].startswith("re: question") and record["loss"] == "sequence"


@pytest.mark.parametrize(
    ("reply", "times", "message"),
    [
        (
            (429, {}, b"slow down"),
            3,
            "/v1/chat/completions: status 429: 'slow down', 3 attempts for the prompt 'poison'",
        ),
        ((500, {}, b"oops"), 3, "status 500: 'oops', 3 attempts"),
        (b"<html>hello</html>", 3, "status 200, but no choices[0].message.content in '<html>hello</html>', 3 attempts"),
        (b'{"choices": [{"message": {"content": 7}}]}', 3, "status 200, but no choices[0].message.content"),
        (b"[" * 100_000, 3, "status 200, but no choices[0].message.content"),
        ((401, {}, b"no such key"), 1, "status 401: 'no such key', 1 attempt for the prompt 'poison'"),
        ((302, {"Location": "file:///etc/passwd"}, b""), 1, "status 302"),
        ("slow", 3, "no answer in 0.5 s (--teacher_timeout), 3 attempts"),
    ],
)
def test_an_endpoint_that_fails_is_named_and_what_it_answered_is_kept(monkeypatch, reply, times, message):
    monkeypatch.setattr(teacher_endpoint, "ATTEMPTS", 3)
    monkeypatch.setattr(teacher_endpoint, "CONCURRENT_REQUESTS", 1)  # two are answered before the third fails

    def answer(prompt, _):
        if prompt != "poison":
            return "fine"
        if reply == "slow":
            time.sleep(3)
        return reply

    got = {}
    with endpoint(answer) as server:
        chat = Chat("m", None, 9)
        asked = Endpoint(server.url, "m", timeout=0.5 if reply == "slow" else 20.0)
        with pytest.raises(UserError) as e:
            ask_endpoint(asked, chat, dict.fromkeys(["a", "b", "poison", "c"], 1), got.__setitem__)
        assert server.asked["poison"] == times
    assert message in str(e.value) and "; 2 of 4 answers are kept, the same command continues" in str(e.value)
    assert [(p, a.text, a.whole) for p, a in got.items()] == [("a", "fine", True), ("b", "fine", True)]
    assert "\n" not in str(e.value)


def test_the_key_of_an_endpoint_is_sent_without_a_line_break_and_never_printed(monkeypatch):
    with endpoint(lambda *_: "fine") as server:
        asked = Endpoint(server.url, "m", timeout=20.0)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        ask_endpoint(asked, Chat("m", None, 9), {"a": 1}, lambda *_: None)
        assert server.seen[0][1] == "Bearer sk-secret"
        for key in ("sk-secret\u2026", "sk-se\ncret"):
            monkeypatch.setenv("OPENAI_API_KEY", key)
            with pytest.raises(UserError, match="OPENAI_API_KEY: expected printable ASCII characters") as e:
                ask_endpoint(asked, Chat("m", None, 9), {"b": 1}, lambda *_: None)
            assert "sk-se" not in str(e.value)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"teacher": "file:///etc/passwd", "teacher_model": "m"},
            "--teacher: URL scheme should be 'http' or 'https'; expected http://host:port/v1",
        ),
        ({"teacher": "http://u:secret@h/v1", "teacher_model": "m"}, "a key goes into OPENAI_API_KEY"),
        ({"teacher": "http://h:x/v1", "teacher_model": "m"}, "invalid port number; expected http://host:port/v1"),
        ({"teacher": "http://127.0.0.1:9/v1"}, "expected --teacher_model, the model's name there"),
        ({"teacher": "gradient-boosting"}, "free text has no classes; expected a label task"),
        ({"teacher": "nobody/nothing"}, "nobody/nothing: neither a model folder nor"),
        (
            {"teacher": "http://127.0.0.1:9/v1", "teacher_model": "m"},
            "ConnectError: All connection attempts failed, 6 attempts",
        ),
        ({"teacher": "http://127.0.0.1:9/v1", "teacher_model": "m", "max_len": 9}, "longer than 9 tokens"),
    ],
)
def test_an_impossible_teacher_is_refused_in_one_line(run, tiny, jsonl, tmp_path, more, message):
    data = jsonl("notes_kd.jsonl", [{"input": f"question {i}"} for i in range(3)])
    done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", **more))
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "secret" not in done.stderr and not (tmp_path / "a").exists()


def test_a_killed_endpoint_pass_asks_only_for_the_rest(tiny, run, jsonl, tmp_path):
    data = jsonl("notes_kd.jsonl", [{"input": f"question {i}", "group": str(i)} for i in range(40)])
    hang, enough = threading.Event(), threading.Event()

    def reply(prompt, _):
        if len(server.seen) > 20 and not hang.is_set():
            enough.set()
            hang.wait(60)
        return f"an answer to {prompt}"

    with endpoint(reply) as server:
        more = {"teacher": server.url, "teacher_model": "m", "max_steps": 1, "dev_rows": 2}
        command = [sys.executable, "kd_train.py", *flags(tiny, data, tmp_path / "a", **more)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(tmp_path / "log", "w") as log:
            first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        assert enough.wait(120), (tmp_path / "log").read_text()[-2000:]
        while not cached(data, "answers") or len(lines(cached(data, "answers")[0])) < 13:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        (answers,) = cached(data, "answers")
        kept = {a["prompt"] for a in lines(answers)}
        with open(answers, "ab") as f:
            f.write(b'{"prompt": "question 39", "te')  # a line that the kill tore
        hang.set()
        server.asked.clear()
        done = run("kd_train.py", *command[2:])
        assert done.returncode == 0, done.stderr[-2000:]
        assert 13 <= len(kept) < 40 and set(server.asked.values()) == {1}
        assert set(server.asked) == {f"question {i}" for i in range(40)} - kept
    assert len(lines(answers)) == 40


def test_ctrl_c_ends_an_endpoint_pass_at_once(tiny, jsonl, tmp_path):
    data = jsonl("notes_kd.jsonl", [{"input": f"question {i}"} for i in range(9)])
    asked, end = threading.Event(), threading.Event()

    def reply(prompt, _):
        asked.set()
        end.wait(60)
        return "late"

    with endpoint(reply) as server:
        more = {"teacher": server.url, "teacher_model": "m"}
        command = [sys.executable, "kd_train.py", *flags(tiny, data, tmp_path / "a", **more)]
        # the shell ignores SIGINT in a job in the background (`make test &`), and a child inherits that
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=ROOT, **pipes, preexec_fn=restore)
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)[0].decode()  # the server still holds every request
        end.set()
    assert process.returncode == 130 and "Traceback" not in output, output[-2000:]
    assert output.strip().endswith("interrupted"), output[-2000:]


def test_a_label_task_is_taught_by_transformers_own_server(run, task, tiny, jsonl, tmp_path):
    model, tokenizer = load_model(ROOT / "runs" / "smollm2_sft", "fp32")
    folder = tmp_path / "teacher"
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task.save(tmp_path / "creditmix_task.json")
    text = "Age: {}.0, Occupation: Scientist, Annual Income: {}.12, Outstanding Debt: {}.98, "
    text += "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
    rows = [{"input": task.prompt(text.format(20 + i, 9000 + 9000 * i, 4500 - 500 * i))} for i in range(10)]
    rows += [{"input": "Write three words about the sea."}]
    data = jsonl("creditmix_kd.jsonl", [{**r, "group": str(i)} for i, r in enumerate(rows)])
    server = Server(tmp_path, ready=False, command=["true"])
    server.process.wait()
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    serve += ["--host", "127.0.0.1", "--port", str(server.port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(server.log, "w") as log:
        server.process = subprocess.Popen(serve, stdout=log, stderr=log, env=environment)
    with server:
        server.wait("/health")
        more = {"teacher": f"http://127.0.0.1:{server.port}/v1", "teacher_model": folder, "max_steps": 1, "dev_rows": 2}
        done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", **more))
    assert done.returncode == 0, done.stderr[-2000:]
    (answers,) = cached(data, "answers")
    found = {a["prompt"]: a["text"] for a in lines(answers)}
    assert len(found) == 11 and len({found[r["input"]] for r in rows[:10]}) > 1
    assert {found[r["input"]] for r in rows[:10]} <= set(task.labels)
    other = found[rows[10]["input"]] not in task.labels
    assert f"taught {11 - other} rows" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Token-level KD


def grown(tiny, folder, more=64, scale=8.0):
    """Folder of a random teacher: the tiny student's shape, `more` padding rows of logits, peaked distributions."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny)
    config.vocab_size += more
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 0.3)
        model.get_input_embeddings().weight[-more:] *= scale if more else 1  # padding rows that would win, if counted
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    return grown(tiny, tmp_path_factory.mktemp("teacher"))


def texts(n):
    words = ["sea", "wind", "stone", "light", "river", "cloud"]
    return [
        {
            "input": f"Say: {words[i % 6]} {i}",
            "teacher_output": f"The {words[i % 5]} of {i} {words[-i % 6]}",
            "group": str(i),
        }
        for i in range(n)
    ]


def test_token_loss_by_hand():
    from kd_train import token_loss

    logits = torch.tensor([[0.0, math.log(2), 0.0, math.log(4)]])  # the student: 1/8, 2/8, 1/8, 4/8
    ids, target = torch.tensor([[3, 0]]), torch.tensor([1])
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()  # of token 3, of token 0, of 1 and 2 together
    kl = 0.5 * math.log(0.5 / 0.5) + 0.3 * math.log(0.3 / 0.125) + 0.2 * math.log(0.2 / 0.375)
    assert token_loss(logits, target, ids, teacher, 1.0, 0.0).item() == pytest.approx(kl, abs=1e-6)
    mixed = 0.75 * kl + 0.25 * math.log(4)  # the text's own token 1 has 2/8
    assert token_loss(logits, target, ids, teacher, 1.0, 0.25).item() == pytest.approx(mixed, abs=1e-6)
    p, q = ([v**0.5 for v in x] for x in ((0.5, 0.3, 0.2), (0.5, 0.125, 0.375)))  # at temperature 2
    p, q = ([v / sum(x) for v in x] for x in (p, q))
    hot = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert token_loss(logits, target, ids, teacher, 2.0, 0.0).item() == pytest.approx(hot, abs=1e-6)
    both = token_loss(logits.repeat(2, 1), target.repeat(2), ids.repeat(2, 1), teacher.repeat(2, 1), 1.0, 0.0)
    assert both.item() == pytest.approx(2 * kl, abs=1e-6)  # a sum, which the trainer divides by the step's tokens


def test_the_top_k_on_disk_is_the_teachers_and_padding_rows_are_sliced(tiny, teacher, tmp_path):
    from distill.train.teacher_topk import SHARD, TopK

    tokenizer = base_config(tiny)[2]
    rows, _ = encode(tokenizer, texts(SHARD + 6), 200, "input", "teacher_output")
    data = tmp_path / "notes_kd.jsonl"

    def compute(rows, k=8):
        folder = teachers.cache_folder(data)
        return TopK(teachers.Teacher(str(teacher), "fp32"), str(tiny), rows, k, folder)

    top_k = compute(rows)
    assert teachers.shared_vocabulary(teacher, tiny) == len(tokenizer)
    model = load_model(teacher, "fp32")[0]
    assert model.config.vocab_size == len(tokenizer) + 64
    masses = []
    for i in (0, SHARD - 1, SHARD, SHARD + 5):
        n = rows[i]["labels"].count(-100)
        with torch.inference_mode():
            logits = model(torch.tensor([rows[i]["input_ids"]])).logits[0, n - 1 : -1]
        assert (logits.argmax(-1) >= len(tokenizer)).any()  # unsliced, a padding row would win
        logp = logits[:, : len(tokenizer)].log_softmax(-1)
        ids, found = top_k[i]
        assert ids.shape == (len(rows[i]["labels"]) - n, 8) and (ids == logp.topk(8).indices).float().mean() > 0.99
        assert (found[:, :8] - logp.gather(1, ids)).abs().max() < 0.01
        assert (found.exp().sum(1) - 1).abs().max() < 2e-3  # float16
        masses.append(found[:, :8].exp().sum(1).mean().item())
    record = top_k.record
    assert record["tokens"] == sum(len(r["labels"]) - r["labels"].count(-100) for r in rows)
    assert 8 * 2 + 9 * 2 < record["bytes_a_token"] < 8 * 2 + 9 * 2 + 2 and record["shards_computed"] == 2
    assert abs(record["kept_mass"] - sum(masses) / 4) < 0.1 and 0 < record["kept_mass"] < 1
    assert compute(rows).record["shards_computed"] == 0
    whole = [path.read_bytes() for path in cached(data, "topk")]
    for i, damage in enumerate((lambda b: b[:-9], lambda b: b"", lambda b: b"x" * 99)):
        path = cached(data, "topk")[i % 2]
        path.unlink()  # the old file may still be mapped
        path.write_bytes(damage(whole[i % 2]))
        assert compute(rows).record["shards_computed"] == 1
        assert [path.read_bytes() for path in cached(data, "topk")] == whole
    longer, _ = encode(tokenizer, texts(SHARD + 9), 200, "input", "teacher_output")
    assert compute(longer).record["shards_computed"] == 1  # the last one
    assert compute(rows, 9).record["shards_computed"] == 2
    os.utime(teacher / "model.safetensors", (1, 1))  # other weights in the same folder
    assert compute(rows).record["shards_computed"] == 2
    with pytest.raises(UserError, match=r"--top_k 49152: expected fewer than the 49152 tokens"):
        compute(rows, 49152)


def test_several_processes_do_not_each_ask_the_teacher(run, tiny, teacher, jsonl, tmp_path):
    data = jsonl("notes_kd.jsonl", texts(9))
    done = run("kd_train.py", *flags(tiny, data, tmp_path / "a", teacher=teacher), env={"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "expected one process for the teacher" in done.stderr.splitlines()[-1]


def test_another_vocabulary_is_refused_before_weights_load(run, tiny, jsonl, tmp_path):
    tokenizer = base_config(tiny)[2]
    folder = tmp_path / "other"
    tokenizer.add_tokens(["<new token>"])
    tokenizer.save_pretrained(folder)
    base_config(tiny)[1].save_pretrained(folder)  # no weights lie here: loading them would be another error
    done = run("kd_train.py", *flags(tiny, jsonl("notes_kd.jsonl", texts(9)), tmp_path / "a", teacher=folder))
    message = "its vocabulary is not that of"
    assert (
        done.returncode == 2 and message in done.stderr and "1 tokens differ, for example '<new token>'" in done.stderr
    )
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()


def test_packed_tokens_have_the_loss_and_gradients_of_each_row_alone(tiny):
    from distill.train.token_distribution import pack_tokens
    from kd_train import token_loss

    model, tokenizer = load_model(tiny, "fp32")
    rows, _ = encode(tokenizer, texts(7), 200, "input", "teacher_output")
    generator, top = torch.Generator().manual_seed(0), []
    for i, row in enumerate(rows):
        row["row"], n = i, len(row["labels"]) - row["labels"].count(-100)
        ids = torch.stack([torch.randperm(len(tokenizer), generator=generator)[:4] for _ in range(n)])
        top.append((ids, torch.randn(n, 5, generator=generator).log_softmax(-1)))

    def step(losses):
        model.zero_grad()
        loss = sum(losses)
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}

    def alone(i):
        n = rows[i]["labels"].count(-100)
        logits = model(torch.tensor([rows[i]["input_ids"]])).logits[0, n - 1 : -1]
        return token_loss(logits, torch.tensor(rows[i]["labels"][n:]), *top[i], 1.5, 0.3)

    batch = pack_tokens(rows, top, tokenizer.pad_token_id)
    assert batch["input_ids"].numel() < 0.8 * sum(len(r["input_ids"]) for r in rows)  # the head is there once
    told = [batch.pop(k) for k in ("target", "top_ids", "top_logp")]
    expected, gradients = step(alone(i) for i in range(7))
    found, shared = step([token_loss(model(**batch).logits.flatten(0, -2), *told, 1.5, 0.3)])
    assert found == pytest.approx(expected, rel=1e-5)
    assert max((gradients[n] - shared[n]).abs().max() for n in gradients) < 1e-4


def divergence(teacher, model, rows):
    """Mean KL(teacher || model) over the trained tokens of rows, all tokens of the vocabulary."""
    found = []
    for row in rows:
        n, ids = row["labels"].count(-100), torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            p, q = (m(ids).logits[0, n - 1 : -1, :49152].log_softmax(-1) for m in (teacher, model))
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found).mean().item()


def test_token_level_training_moves_the_student_to_its_teacher(run, tiny, tiny_adapter, jsonl, tmp_path):
    model, tokenizer = load_model(tiny, "fp32")
    model.model.norm.weight.data.fill_(25)  # as it is, all tokens are about as likely and there is nothing to learn
    student = tmp_path / "student"
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    teacher = tiny_adapter("token teacher", base=student)
    (Path(teacher) / "train_rows.txt").write_text("0123456789abcdef\n")  # what a teacher has seen, its student knows
    data = jsonl("notes_kd.jsonl", texts(60))
    more = {"teacher": teacher, "max_steps": 60, "batch_size": 16, "micro_batch": 8, "lr": 0.01, "eval_steps": 30}
    done = run("kd_train.py", *flags(student, data, tmp_path / "a", **more))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert "0123456789abcdef" in (tmp_path / "a" / "train_rows.txt").read_text().split()
    assert record["loss"] == "token distribution" and record["teacher_tokens"]["top_k"] == 32
    assert "bytes a token" in done.stdout and "of the probability" in done.stdout
    rows, _ = encode(tokenizer, texts(60), 200, "input", "teacher_output")
    of = [load_model(x, "fp32")[0] for x in (teacher, student, tmp_path / "a")]
    before, after = divergence(of[0], of[1], rows[:20]), divergence(of[0], of[2], rows[:20])
    assert after < 0.5 * before, (before, after)


def test_a_local_teacher_writes_what_is_missing_and_a_killed_top_k_pass_is_resumed(run, tiny, teacher, tmp_path):
    rows = texts(400)
    for i in (3, 4, 5, 6):
        del rows[i]["teacher_output"]
    where = [tmp_path / name / "notes_kd.jsonl" for name in ("whole", "parts")]
    for path in where:
        write_jsonl(path, rows)
    more = {"teacher": teacher, "max_steps": 40, "batch_size": 8, "max_len": 60, "eval_steps": 40, "top_k": 16}
    whole = run("kd_train.py", *flags(tiny, where[0], tmp_path / "a", **more))
    assert whole.returncode == 0, whole.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    cut = record["rows_untaught"].get("answers that are empty or longer than --max_len", 0)
    assert f"taught {4 - cut} rows" in whole.stdout and len(lines(cached(where[0], "answers")[0])) == 4
    command = [sys.executable, "kd_train.py", *flags(tiny, where[1], tmp_path / "b", **more)]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    while not cached(where[1], "topk") and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {p.name: p.stat().st_mtime_ns for p in cached(where[1], "topk")}
    done = run("kd_train.py", *command[2:])
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (cached(path, "topk") for path in where)
    assert [p.name for p in one] == [p.name for p in other] and len(one) == 6 and 1 <= len(before) < 6
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]
    assert all(p.stat().st_mtime_ns == before[p.name] for p in other if p.name in before)  # kept, not made again
    assert f"{6 - len(before)} of 6 shards new" in done.stdout
    assert load_file(one[0])["ids"].dtype == "uint16"
