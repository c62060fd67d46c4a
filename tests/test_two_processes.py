"""Two processes are the run of one: steps, rows, adapter, one report.

`accelerate launch --num_processes 2` starts torch.distributed.run for GPUs; for CPUs it wants MPI, so the tests start
that launcher themselves.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill.train.run_folder import checkpoints_in, damaged_file

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
# each process draws its own dropout, so it is off; all else is the script as it is
WITHOUT_DROPOUT = """
import runpy, sys
sys.path.insert(0, {root!r})
from distill.train import student
plain = student.lora_config
def without_dropout(*args):
    config = plain(*args)
    config.lora_dropout = 0.0
    return config
student.lora_config = without_dropout
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory, task):
    """Folder with creditmix_{sft,kd,dpo}.jsonl of 80 rows, the same rows as raw JSON, and the task."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    task.save(folder / "creditmix_task.json")
    rows, raw = {"sft": [], "kd": [], "dpo": []}, []
    for i in range(80):
        label, other = rng.sample(task.labels, 2)
        fields = f"Age: {rng.randint(18, 60)}.0, Outstanding Debt: {i:03}.0"
        raw.append({"question": fields, "answer": label, "group": f"c{i}"})
        text, probs = task.prompt(fields), {name: 0.8 if name == label else 0.1 for name in task.labels}
        rows["sft"].append({"input": text, "output": label})
        rows["kd"].append({"input": text, "teacher_output": label, "teacher_probs": probs})
        rows["dpo"].append({"prompt": text, "chosen": label, "rejected": other})
    for route, own in rows.items():
        (folder / f"creditmix_{route}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    (folder / "raw.json").write_text(json.dumps(raw))
    return folder


def start(command, folder):
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_two_processes_train_as_one(tiny, data, tmp_path, route):
    script = tmp_path / "without_dropout.py"
    script.write_text(WITHOUT_DROPOUT.format(root=str(ROOT)))
    found = {}
    for name, launch, micro in (("one", [sys.executable], 4), ("two", LAUNCH, 2)):
        flags = {"student": tiny, "data": data / f"creditmix_{route}.jsonl", "save_dir": tmp_path / name}
        flags |= {"max_steps": 3, "batch_size": 8, "micro_batch": micro, "lr": 0.003, "dev_rows": 4, "eval_steps": 3}
        command = [*launch, str(script), str(ROOT / f"{route}_train.py")]
        done = start([*command, *(str(x) for k, v in flags.items() for x in (f"--{k}", v))], tmp_path)
        record = json.loads((tmp_path / name / "run.json").read_text())
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        rows = (tmp_path / name / "train_rows.txt").read_text()
        found[name] = record, weights, rows, done.stdout
    (one, expected, rows, _), (two, weights, same, output) = found["one"], found["two"]
    assert output.count("adapter in ") == 1 and "3 steps of 2 x 2 accumulated x 2 processes" in output
    assert rows == same and one["steps"] == two["steps"] == 3 and one["rows"] == two["rows"]
    assert abs(one["train_loss"] - two["train_loss"]) < 1e-3
    assert weights.keys() == expected.keys()
    for name, w in expected.items():  # bf16 on disk
        assert (w.float() - weights[name].float()).norm() < 0.02 * w.float().norm(), name


# one process alone gets a signal, before its forward pass number 6: the second micro-batch of step 3
SIGNALLED = """
import os, pathlib, runpy, signal, sys
sys.path.insert(0, {root!r})
from distill.train.callbacks import StopOnSignal
before_forward, passes = StopOnSignal.before_forward, []
def counted(stop, *_):
    passes.append(1)
    if len(passes) == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    pathlib.Path({folder!r}, "passes-" + os.environ["RANK"]).write_text(str(len(passes)))
    before_forward(stop)
StopOnSignal.before_forward = counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_stop_in_the_same_forward_pass_and_save(tiny, data, tmp_path):
    script, folder = tmp_path / "signalled.py", tmp_path / "run"
    script.write_text(SIGNALLED.format(root=str(ROOT), folder=str(tmp_path)))
    flags = {"student": tiny, "data": data / "creditmix_sft.jsonl", "save_dir": folder, "max_steps": 5}
    flags |= {"batch_size": 8, "micro_batch": 2, "dev_rows": 4, "eval_steps": 5}
    command = [*LAUNCH, str(script), "sft_train.py", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0 and "stopped at step 2; the same command with --resume" in done.stdout, done.stderr
    assert [(tmp_path / f"passes-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    (checkpoint,) = checkpoints_in(folder)
    assert checkpoint.name == "checkpoint-2" and damaged_file(checkpoint) is None
    assert sorted(path.name for path in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_two_processes_refuse_a_batch_that_they_cannot_share(tiny, data, tmp_path):
    flags = ["--student", tiny, "--data", data / "creditmix_sft.jsonl", "--save_dir", tmp_path / "a"]
    command = [*LAUNCH, "sft_train.py", *map(str, flags), "--batch_size", "7", "--max_steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert "error: --batch_size 7: expected a multiple of the 2 processes" in done.stderr


def test_two_processes_leave_one_report(tiny, data, tmp_path):
    flags = ["--model_dir", tiny, "--data", data / "raw.json", "--task", data / "creditmix_task.json"]
    done = start([*LAUNCH, "eval_creditmix.py", *map(str, flags), "--out", str(tmp_path / "report")], tmp_path)
    assert done.stdout.count("held-out rows of") == 1 and done.stdout.count("report.json, predictions.jsonl") == 1
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["n"] == len((tmp_path / "report" / "predictions.jsonl").read_text().splitlines()) > 0
