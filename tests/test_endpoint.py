"""--endpoint: documents and code by an OpenAI-compatible server, its answers validated as those of a model here."""

import http.server
import json
import runpy
import sys
import threading

import pytest

from distill.export.gguf_file import write_gguf
from distill.export.llama_cpp import LlamaCpp
from distill.files import ROOT, UserError, write_json
from distill.tasks.endpoint import Endpoint
from distill.tasks.idp_documents import extract_from

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["invoice", "receipt"]}, "paid": {"type": "boolean"}},
    "required": ["kind", "paid"],
    "additionalProperties": False,
}


@pytest.fixture
def server():
    """server(answer) -> address of an endpoint whose chat completions are answer(body) -> (status, text)."""
    started = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(200, json.dumps({"object": "list", "data": [{"id": "student", "object": "model"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = answer(body)
                if status == 200:
                    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                    content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})
                self.send(status, content)

            def send(self, status, text):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        started.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}/v1"

    yield start
    for one in started:
        one.shutdown()


def test_an_answer_that_breaks_the_schema_is_asked_again(server):
    bodies = []

    def answer(body):
        bodies.append(body)
        return 200, json.dumps({"kind": "invoice", "paid": True if len(bodies) > 1 else "perhaps"})

    (found,) = extract_from(Endpoint(server(answer)), ["INVOICE 17"], SCHEMA, 40)
    assert found.value == {"kind": "invoice", "paid": True}
    first, second = bodies
    assert first["model"] == "student" and first["max_tokens"] == 40
    assert first["response_format"]["json_schema"]["schema"] == SCHEMA
    assert (first["temperature"], second["temperature"]) == (0, 0.8)


def test_a_server_that_ignores_the_schema_gives_an_error_and_no_value(server):
    (found,) = extract_from(Endpoint(server(lambda body: (200, "I am a poem"))), ["x"], SCHEMA, 40)
    assert isinstance(found.value, UserError) and "not JSON" in str(found.value)


def test_details_of_a_servers_answer_have_no_confidence(server, monkeypatch, capsys, tmp_path):
    address = server(lambda body: (200, json.dumps({"kind": "invoice", "paid": True})))
    write_json(tmp_path / "schema.json", SCHEMA)
    flags = ["--endpoint", address, "--schema", tmp_path / "schema.json", "--document", "Invoice 17", "--details"]
    monkeypatch.setattr(sys, "argv", ["infer_idp.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "infer_idp.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert [(d["confidence"], d["grounded"]) for d in json.loads(out)["details"]] == [(None, True), (None, None)]
    assert err == "--endpoint: no confidence, which needs the model here; grounded is there\n"


def test_turn_markers_of_a_document_are_broken(server):
    seen = []
    Endpoint(server(lambda body: (seen.append(body), (200, "x"))[1])).ask("a<|im_end|>b", 5, 0.0, 0)
    assert seen[0]["messages"] == [{"role": "user", "content": "a< |im_end|>b"}]


@pytest.mark.parametrize(
    ("script", "own"), [("infer_idp.py", ["--document", "x"]), ("infer_codegen.py", ["--prompt", "x"])]
)
def test_an_unreachable_endpoint_is_one_line(run, jsonl, script, own, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    own = [*own, "--schema", schema] if "idp" in script else own
    result = run(script, "--endpoint", "http://127.0.0.1:9/v1", *own)
    assert result.returncode == 2
    assert result.stderr == "error: --endpoint http://127.0.0.1:9/v1: nobody answers: [Errno 111] Connection refused\n"


def test_a_refusal_is_one_line(server):
    endpoint = Endpoint(server(lambda body: (400, '{"error": "the request exceeds the context"}')))
    with pytest.raises(UserError, match=r"status 400: .*exceeds the context"):
        endpoint.ask("x", 5, 0.0, 0)
    with pytest.raises(UserError, match="expected http://host:port/v1"):
        Endpoint("localhost:8080")


def test_code_from_an_endpoint(run, server):
    address = server(lambda body: (200, "Here:\n```python\ndef add(a, b):\n    return a + b\n```"))
    result = run("infer_codegen.py", "--endpoint", address, "--prompt", "Write add(a, b).", "--json")
    row = json.loads(result.stdout)
    assert row["code"] == "def add(a, b):\n    return a + b" and row["tokens"] == 3
    assert result.returncode == 0


@pytest.mark.extra("xllamacpp")
def test_documents_and_code_by_a_real_llama_cpp(run, tiny, tmp_path, jsonl):
    from transformers import AutoTokenizer

    write_gguf(tiny, AutoTokenizer.from_pretrained(tiny), tmp_path / "tiny.gguf", "f16", "tiny")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    documents = jsonl("documents.jsonl", [{"document": f"RECEIPT {i}"} for i in range(3)])
    requests = jsonl("requests.jsonl", [{"prompt": "Write add(a, b)."}, {"prompt": "Write mul(a, b)."}])
    with LlamaCpp(tmp_path / "tiny.gguf", 1024) as engine:
        address = f"{engine.address}/v1"
        given = ["--schema", tmp_path / "schema.json", "--data", documents, "--out", tmp_path / "out.jsonl"]
        result = run("infer_idp.py", "--endpoint", address, *given)
        assert result.returncode == 0, result.stderr
        given = ["--data", requests, "--out", tmp_path / "code.jsonl", "--max_new_tokens", 8, "--n", 2]
        result = run("infer_codegen.py", "--endpoint", address, *given)
        assert result.returncode == 0, result.stderr
        result = run(
            "infer_idp.py", "--endpoint", address, "--schema", tmp_path / "schema.json", "--document", "x " * 2000
        )
    assert result.returncode == 2 and "status 400" in result.stderr and result.stderr.count("\n") == 1
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(row["output"]) for row in rows] == [{"kind", "paid"}] * 3
    rows = [json.loads(line) for line in (tmp_path / "code.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(0 < row["tokens"] <= 8 for row in rows)
