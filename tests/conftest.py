"""A tiny random student with the real tokenizer, adapters for it, and a way to run the scripts as a user does."""

import importlib.util
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Scripts choose fp32 where bf16 is slow, so without its instructions outputs are those of fp32 on every CPU.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

from common import Calibration, Task  # noqa: E402
from distill.files import write_json  # noqa: E402
from distill.model.hub import embedded_student  # noqa: E402


def pytest_runtest_setup(item):
    for mark in item.iter_markers("extra"):
        for package in mark.args:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed; `make test-extra` installs it")


@pytest.fixture(scope="session")
def task():
    return Task.load(ROOT / "data" / "creditmix_task.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a random Llama of two layers with the embedded student's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(embedded_student())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny, task, tmp_path_factory):
    """name -> folder of an adapter with random non-zero weights on `tiny`, with task and calibration."""
    made = {}

    def make(name, base=None, fitted=True):
        if name in made:
            return made[name]
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = base or tiny
        model = AutoModelForCausalLM.from_pretrained(base)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        torch.manual_seed(sum(map(ord, name)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        model.peft_config["default"].base_model_name_or_path = str(base)
        folder = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folder)
        task.save(folder / "task.json")
        if fitted:
            Calibration(0.0, (0.1, 0.0, -0.1), 0.8, True).save(folder, task)
        write_json(folder / "run.json", {"route": name, "status": "finished"})
        made[name] = folder
        return folder

    return make


@pytest.fixture
def run(tmp_path):
    """run("sft_train.py", "--data", ...) -> CompletedProcess, in the project's folder with one thread."""

    def start(script, *args, timeout=300, env=None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)

    return start


@pytest.fixture
def parsed(monkeypatch):
    """parsed("python infer_idp.py --data ...") -> the flags of a printed command, which its script accepts."""

    def parse(command):
        python, script, *flags = shlex.split(command)
        found = []
        with monkeypatch.context() as patched:
            patched.setattr("distill.files.cli", lambda main, parser: found.append(parser.parse_args(flags)))
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert python == "python"
        return found[0]

    return parse


@pytest.fixture
def jsonl(tmp_path):
    """jsonl("name.jsonl", rows) -> its path."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return path

    return write
