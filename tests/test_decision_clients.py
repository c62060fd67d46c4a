"""Clients of the decision protocol that others wrote, against our server: `make test-extra` installs them.

typesafe-sdk is TypeSafe's own client, jev-eval measures calibration on labelled rows, LiteLLM translates between
providers (as hosted_vllm), jevcompat is a specification of /v1/systemone with 48 checks, schemathesis makes requests
from our OpenAPI schema. The openai client is tested in test_decisions.py, since it is pinned for everybody.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from serving import Server, rows

KEY = "open-sesame"
TEXTS = rows(12)
LABELS = ("Good", "Standard", "Bad")
LABEL = {"type": "choice", "instructions": "Credit mix?", "criteria": dict.fromkeys(LABELS)}


@pytest.fixture(scope="module")
def server(tiny, tiny_adapter, tmp_path_factory):
    """The tiny model with room for 255 described options, and one adapter."""
    home = tmp_path_factory.mktemp("clients")
    base = shutil.copytree(tiny, home / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    folders = {"SFT_DIR": tiny_adapter("clients", base), "KD_DIR": home / "kd", "DPO_DIR": home / "dpo"}
    with Server(home, BASE_MODEL=base, API_KEY=KEY, PRECISION="fp32", DEADLINE=120, **folders) as running:
        running.url = f"http://127.0.0.1:{running.port}"
        yield running


@pytest.mark.extra("typesafe_sdk")
def test_typesafes_client(server):
    from typesafe_sdk import Choice, Noul, RetryPolicy, Score, TypeSafeClient, TypeSafeUnprocessableEntityError

    questions = {
        "label": Choice(instructions="Credit mix?", criteria=dict.fromkeys(LABELS)),
        "young": Noul(instructions="Younger than 30?", criteria={"true": "the age is below 30"}),
        "debt": Score(instructions="How large is the debt?", criteria=["small", {"size": "medium"}, "large"]),
    }
    with TypeSafeClient(api_key=KEY, base_url=server.url, retry=RetryPolicy(max_retries=0)) as client:
        assert [model.name for model in client.models.list().models] == ["base", "sft"]
        got = client.system_one(state=TEXTS[0], questions=questions, model="sft")
        want = server.infer("sft", TEXTS[0])[1]
        assert got.choices["label"].probabilities == pytest.approx(want["probabilities"], abs=1e-3)
        assert got.choices["label"].choice == want["prediction"]
        assert 0 < got.nouls["young"].noul < 1 and got.usage.input_tokens > 100
        assert sum(got.scores["debt"].probabilities.values()) == pytest.approx(1)
        with pytest.raises(TypeSafeUnprocessableEntityError, match="Input should be 'base'"):
            client.system_one(state="x", questions={"q": Noul(instructions="x")})  # its default model is Jev


@pytest.mark.extra("jev_eval")
def test_jev_eval_measures_the_server(server, tmp_path):
    found = server.infer("sft", TEXTS)[1]
    labelled = [
        {"state": text, "labels": {"mix": one["prediction"] if i % 3 else "Bad"}}
        for i, (text, one) in enumerate(zip(TEXTS, found, strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    env = os.environ | {"JEV_API_KEY": KEY, "TYPESAFE_AI_BASE_URL": f"{server.url}/v1"}

    def jev_eval(*args):
        command = [sys.executable, "-c", "import sys; from jev_eval.cli import main; sys.exit(main())", *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    cache = ("--cache", "run.jsonl")
    asked = ("--data", "rows.jsonl", "-q", f"mix:choice({','.join(LABELS)})", "--model", "sft")
    assert "12 rows, 12 answers (12 usable)" in jev_eval("run", *asked, *cache)
    right = sum(row["labels"]["mix"] == one["prediction"] for row, one in zip(labelled, found, strict=True))
    assert f"{100 * right / 12:.1f}%" in jev_eval("report", *cache)


@pytest.mark.extra("litellm")
def test_litellm_in_both_shapes(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices
    import litellm

    where = {"api_base": f"{server.url}/v1", "api_key": KEY, "model": "hosted_vllm/sft"}
    want = server.infer("sft", TEXTS[0])[1]["probabilities"]
    got = litellm.systemone(state=TEXTS[0], questions={"label": LABEL}, **where)
    assert got.answers["label"].probabilities == pytest.approx(want, abs=1e-3)
    choices = [{"value": label} for label in LABELS]
    asked = [{"type": "choice", "name": "label", "instructions": "Credit mix?", "choices": choices}]
    got = litellm.decisions(input=TEXTS[0], questions=asked, **where)
    assert {one.value: one.probability for one in got.answers[0].probabilities} == pytest.approx(want, abs=1e-3)


@pytest.mark.extra("jevcompat", "typesafe_sdk")
def test_the_written_specification(server):
    """All of its requirements but one: we do not answer in the name of a model that we are not."""
    from jevcompat.runner import run

    report = run(server.url, key=KEY, model="base", timeout=120)
    assert not report.aborted and not report.inconclusive
    failed = {one.id: [finding.message for finding in one.findings] for one in report.results if one.status == "fail"}
    assert set(failed) == {"request.model-alias"}, failed
    # there is a key, and an unknown model is a malformed request
    assert {one.id for one in report.results if one.status == "skip"} == {"auth.ignored-when-off", "errors.shape"}


@pytest.mark.extra("schemathesis")
def test_requests_made_from_the_schema(server, tmp_path):
    """No server error, and no status, type or body that the schema does not name."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    paths = [f"--include-path={path}" for path in ("/v1/systemone", "/v1/decisions", "/v1/models", "/v1/models/{name}")]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *paths]
    command += ["--header", f"X-API-Key: {KEY}", "--checks", checks, "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", "30", "--seed", "0", "--max-time", "60", "--generation-database", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert server.infer("sft", "x")[0] == 200
