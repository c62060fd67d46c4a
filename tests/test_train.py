"""The three trainers as a user runs them, on a tiny random student, and their losses by hand."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import row_hash

ROOT = Path(__file__).resolve().parent.parent
FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.json", "curve.png", "train_rows.txt"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, task):
    """Folder with creditmix_{sft,kd,dpo}.jsonl of 120 easy rows and the task file beside them."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    task.save(folder / "creditmix_task.json")
    with (
        open(folder / "creditmix_sft.jsonl", "w") as sft,
        open(folder / "creditmix_kd.jsonl", "w") as kd,
        open(folder / "creditmix_dpo.jsonl", "w") as dpo,
    ):
        for i in range(120):
            label = rng.choice(task.labels)
            text = task.prompt(f"Age: {rng.randint(18, 60)}.0, Outstanding Debt: {task.labels.index(label)}{i:03}.0")
            probs = {name: 0.8 if name == label else 0.1 for name in task.labels}
            other = rng.choice([name for name in task.labels if name != label])
            sft.write(json.dumps({"input": text, "output": label, "group": str(i // 2)}) + "\n")
            row = {"input": text, "teacher_output": label, "teacher_probs": probs, "output": label}
            kd.write(json.dumps({**row, "group": str(i // 2)}) + "\n")
            dpo.write(json.dumps({"prompt": text, "chosen": label, "rejected": other, "group": str(i // 2)}) + "\n")
    return folder


def options(tiny, data, route, save_dir, **more):
    more = {"max_steps": 4, "batch_size": 8, "micro_batch": 4, "lr": 0.01, "dev_rows": 8, "eval_steps": 2, **more}
    flags = {"student": tiny, "data": data / f"creditmix_{route}.jsonl", "save_dir": save_dir, **more}
    return [str(x) for k, v in flags.items() for x in (f"--{k}", v)]


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_a_route_leaves_a_whole_adapter_folder(run, tiny, data, tmp_path, route):
    done = run(f"{route}_train.py", *options(tiny, data, route, tmp_path / "a"), "--max_vram_gb", 4)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("--max_vram_gb: no GPU here" in done.stdout) != torch.cuda.is_available()
    folder = tmp_path / "a"
    assert {p.name for p in folder.iterdir()} >= FILES | {"task.json", "calibration.json", "tensorboard"}
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("*.tmp"))
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2 and {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert all(w.any() for name, w in weights.items() if "lora_B" in name)  # every matrix moved from its zero
    record = json.loads((folder / "run.json").read_text())
    assert record["route"] == route and record["status"] == "finished" and record["steps"] == 4
    assert record["args"]["batch_size"] == 8 and record["data_sha256"] and record["versions"]["trl"]
    assert len((folder / "train_rows.txt").read_text().split()) == 32  # 4 steps of 8 rows see no more
    assert ">>>" in done.stdout and "<|im_end|><<<" in done.stdout and "expected memory" in done.stdout
    assert re.search(r"^step 1: loss [\d.]+, learning rate [\de.-]+$", done.stdout, re.M), done.stdout
    measured = r"^step 4: development loss [\d.]+(, token accuracy [\d.]+)?, accuracy [\d.]+, label log-loss [\d.]+$"
    assert re.search(measured, done.stdout, re.M) and "{'" not in done.stdout
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    answer = run("infer_creditmix.py", "--model_dir", folder, "--features", "Age: 23.0")
    assert json.loads(answer.stdout)["prediction"] in ("Good", "Standard", "Bad"), answer.stderr[-500:]


def test_dpo_from_an_adapter_records_its_reference(run, tiny, tiny_adapter, data, tmp_path):
    more = {"max_steps": 2, "init_adapter": tiny_adapter("sft")}
    done = run("dpo_train.py", *options(tiny, data, "dpo", tmp_path / "a", **more))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["reference"] == f"a frozen copy of {tiny_adapter('sft')}" and record["reference"] in done.stdout
    before = load_file(tiny_adapter("sft") / "adapter_model.safetensors")
    after = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[k].bfloat16() != after[k]).any() for k in before)  # every LoRA matrix changed, A and B


@pytest.mark.parametrize("teacher", ["gradient-boosting", "a model"])
def test_a_teacher_answers_rows_that_have_no_answer(run, tiny, tiny_adapter, data, jsonl, tmp_path, teacher):
    rows = [json.loads(line) for line in (data / "creditmix_sft.jsonl").read_text().splitlines()]
    path = jsonl("creditmix_kd.jsonl", rows)
    flags = ["--student", tiny, "--data", path, "--task", data / "creditmix_task.json", "--save_dir", tmp_path / "a"]
    flags += ["--max_steps", 1, "--batch_size", 8, "--dev_rows", 4]
    refused = run("kd_train.py", *flags)
    assert refused.returncode == 2 and "row 1: field 'teacher_output' is missing; expected one" in refused.stderr
    done = run("kd_train.py", *flags, "--teacher", tiny_adapter("sft") if teacher == "a model" else teacher)
    assert done.returncode == 0 and "taught 120 rows" in done.stdout, done.stderr[-2000:]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["loss"] == "label distribution"


def test_free_text_trains_without_a_task(run, tiny, jsonl, tmp_path):
    rows = [{"input": f"question {i}", "output": f"an answer of words {i}", "copy_of": f"{i:016x}"} for i in range(30)]
    path = jsonl("notes_sft.jsonl", rows)
    flags = ["--student", tiny, "--data", path, "--save_dir", tmp_path / "a", "--max_steps", 2, "--batch_size", 4]
    done = run("sft_train.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    hashes = set((tmp_path / "a" / "train_rows.txt").read_text().split())
    trained = [row for row in rows if row["copy_of"] in hashes]  # an evaluation on the original must see it
    assert len(trained) == 8 and hashes == {h for r in trained for h in (row_hash(r["input"]), r["copy_of"])}
    assert not (tmp_path / "a" / "task.json").exists() and not (tmp_path / "a" / "calibration.json").exists()


def stopped_at(flags, steps, number):
    """(exit code, output) of sft_train.py that gets a signal at one of the steps; the bar shows some of them only."""

    def default_handler():  # a shell starts background jobs with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "sft_train.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=default_handler, **pipes)
    seen = b""
    while not re.search(steps, seen) and started.poll() is None:
        seen += os.read(started.stdout.fileno(), 4096)
    started.send_signal(number)
    output = started.communicate(timeout=120)[0].decode()
    return started.returncode, output


def test_stopped_and_resumed_is_the_run_that_was_not_stopped(run, tiny, data, tmp_path):
    whole = options(tiny, data, "sft", tmp_path / "whole", max_steps=40)
    assert run("sft_train.py", *whole).returncode == 0
    flags = options(tiny, data, "sft", tmp_path / "parts", max_steps=40)
    code, output = stopped_at(flags, rb" ([89]|[123]\d)/40", signal.SIGINT)
    assert code == 130 and "--resume_from_checkpoint last continues" in output, output[-2000:]
    refused = run("sft_train.py", *flags)
    assert refused.returncode == 2 and "an unfinished run; expected --resume_from_checkpoint last" in refused.stderr
    resumed = run("sft_train.py", *flags, "--resume_from_checkpoint", "last")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    found = load_file(tmp_path / "parts" / "adapter_model.safetensors")
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_a_run_is_identified_by_the_contents_of_its_inputs(data, tiny_adapter, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_adapter("sft"), teacher)
    for name in ("creditmix_sft.jsonl", "creditmix_task.json"):
        shutil.copy(data / name, tmp_path)
    inputs = {"task": tmp_path / "creditmix_task.json", "teacher": str(teacher), "init_adapter": None}
    first = checked(tmp_path, tmp_path / "a", inputs=inputs).identity
    (tmp_path / "creditmix_task.json").write_text((data / "creditmix_task.json").read_text() + " ")
    (teacher / "adapter_model.safetensors").write_bytes(b"trained again")
    second = checked(tmp_path, tmp_path / "a", inputs=inputs).identity
    assert {k for k in first if first[k] != second[k]} == {"task_sha256", "teacher_sha256"}


def test_sigterm_saves_too(tiny, data, tmp_path):
    from distill.train.run_folder import damaged_file

    flags = options(tiny, data, "sft", tmp_path / "a", max_steps=400, eval_steps=300)
    code, output = stopped_at(flags, rb" ([3-9]|\d\d+)/400", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "--resume_from_checkpoint last continues" in output, output[-2000:]
    (saved,) = (tmp_path / "a").glob("checkpoint-*")  # none was due
    assert 3 <= int(saved.name.split("-")[1]) < 300 and damaged_file(saved) is None


GOOD = {"input": "x", "output": "Good", "group": "1"}
KD = {"input": "x", "teacher_output": "Good"}


@pytest.mark.parametrize(
    ("script", "rows", "message"),
    [
        ("sft", None, "no such file"),
        ("sft", [], "the file is empty"),
        ("sft", [GOOD, {"input": "x"}], ":2: field 'output' is missing"),
        ("sft", [GOOD, {**GOOD, "output": "Great"}], "row 2: field 'output': 'Great' is no label; expected"),
        ("sft", [{**GOOD, "output": 3}], ":1: field 'output': expected a valid string, got 3"),
        ("sft", [GOOD, {**GOOD, "input": " "}], ":2: field 'input': expected text that is not blank, got ' '"),
        ("kd", [{**KD, "teacher_probs": {"Good": 0.5, "Bad": 0.2}}], "expected numbers in [0, 1] that sum to 1"),
        ("kd", [{**KD, "teacher_probs": {"Great": 1.0}}], "['Great'] are no labels"),
        ("kd", [{**KD, "teacher_probs": {"Good": "1"}}], "expected numbers in [0, 1]"),
        ("kd", [KD, {**KD, "output": "Great"}], "row 2: field 'output': 'Great' is no label; expected"),
        (
            "dpo",
            [{"prompt": "x", "chosen": "Bad", "rejected": "Bad"}],
            "row 1: fields 'chosen' and 'rejected' are equal",
        ),
        ("dpo", [{"prompt": "x", "chosen": "Bad", "rejected": "Worse"}], "field 'rejected': 'Worse' is no label"),
    ],
)
def test_bad_rows_stop_a_trainer_before_it_loads(run, tiny, jsonl, task, tmp_path, script, rows, message):
    task.save(tmp_path / "creditmix_task.json")
    path = tmp_path / f"creditmix_{script}.jsonl" if rows is None else jsonl(f"creditmix_{script}.jsonl", rows)
    done = run(f"{script}_train.py", "--student", tiny, "--data", path, "--save_dir", tmp_path / "a")
    assert done.returncode == 2 and message in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_rows_over_max_len_are_dropped_and_counted(run, tiny, data, jsonl, task, tmp_path, route):
    done = run(f"{route}_train.py", *options(tiny, data, route, tmp_path / "a", max_len=20))
    assert done.returncode == 2 and "are longer than --max_len 20; the shortest has" in done.stderr
    rows = [json.loads(line) for line in (data / f"creditmix_{route}.jsonl").read_text().splitlines()]
    for row in rows[:10]:
        row["prompt" if route == "dpo" else "input"] += " and so on" * 200
    jsonl(f"creditmix_{route}.jsonl", rows)
    task.save(tmp_path / "creditmix_task.json")
    done = run(f"{route}_train.py", *options(tiny, tmp_path, route, tmp_path / "a", max_len=200, max_steps=20))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    dropped = record["rows_dropped"]["longer than 200 tokens"]
    assert 5 <= dropped <= 10 and record["rows"] + dropped > 90 and f"{dropped} longer than" in done.stdout
    of_dev = record["dev_rows_dropped"]["longer than 200 tokens"]
    assert dropped + of_dev == 10 and (f"{of_dev} development rows longer" in done.stdout) == (of_dev > 0)


def test_an_unknown_student(run, tiny, data, tmp_path):
    done = run("sft_train.py", *options("nobody/nothing", data, "sft", tmp_path / "b"))
    assert done.returncode == 2 and "error: nobody/nothing: neither a model folder nor" in done.stderr
    assert not list(tmp_path.glob("*/adapter_*"))


def test_a_full_disk_leaves_nothing_half_written(tiny, data, tmp_path):
    def small_files():  # a file over 40 kB fails as it would on a full disk
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    flags = options(tiny, data, "sft", tmp_path / "a", max_steps=1, eval_steps=5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "sft_train.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=small_files, timeout=200
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "\nerror: " in done.stderr.replace("\r", "\n"), done.stderr[-1500:]  # the bar may end after it
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        ("sft", "--seed", "-1"),
        ("sft", "--seed", str(2**32)),
        ("sft", "--max_steps", "0"),
        ("kd", "--alpha", "1.5"),
        ("kd", "--alpha", "nan"),
        ("kd", "--temperature", "1e30"),
        ("dpo", "--beta", "0"),
        ("dpo", "--sft_weight", "-1"),
    ],
)
def test_a_flag_out_of_range(run, script, flag, value):
    done = run(f"{script}_train.py", flag, value)
    assert done.returncode == 2 and f"argument {flag}: invalid number " in done.stderr.splitlines()[-1], done.stderr


def checkpoint(folder, step):
    """A checkpoint folder with the files that a trainer leaves there."""
    from safetensors.torch import save_file

    from distill.files import write_json

    (folder / f"checkpoint-{step}").mkdir(parents=True)
    for name in ("optimizer.pt", "weights.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": torch.ones(9)}, folder / f"checkpoint-{step}" / name)
    save_file({"a": torch.ones(9)}, folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    write_json(folder / f"checkpoint-{step}" / "trainer_state.json", {"global_step": step})
    return folder / f"checkpoint-{step}"


def checked(data, folder, lr=0.1, resume=None, inputs=None, route="sft", student="s"):
    """check_run() of a run into the folder."""
    from distill.train.run_folder import check_run

    path, settings = data / "creditmix_sft.jsonl", {"lr": lr, "save_dir": folder, "resume_from_checkpoint": resume}
    return check_run(route, folder, student=student, data=path, settings=settings, resume=resume, inputs=inputs)


def test_a_run_killed_in_its_first_checkpoint_starts_again(data, tmp_path):
    from distill.train.run_folder import start_run

    start_run(checked(data, tmp_path))
    (checkpoint(tmp_path, 4) / "trainer_state.json").unlink()  # the last file of a checkpoint
    start_run(checked(data, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "weights.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
def test_a_damaged_checkpoint_is_named(data, tmp_path, name):
    from distill.files import UserError
    from distill.train.run_folder import start_run

    start_run(checked(data, tmp_path))
    checkpoint(tmp_path, 8)
    path = checkpoint(tmp_path, 12) / name
    last = checked(data, tmp_path, resume="last")
    assert last.checkpoint == path.parent and last.settings["resume_from_checkpoint"] == str(path.parent)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"checkpoint-12/{name}: missing or damaged; expected an earlier checkpoint"):
        checked(data, tmp_path, resume="last")
    assert checked(data, tmp_path, resume=str(tmp_path / "checkpoint-8")).checkpoint == tmp_path / "checkpoint-8"


def test_another_flag_route_or_student_is_another_run(data, tmp_path):
    from distill.files import UserError
    from distill.train.run_folder import start_run

    start_run(checked(data, tmp_path))
    checkpoint(tmp_path, 4)
    for name, old, new in (("lr", 0.1, 0.2), ("route", "sft", "dpo"), ("student", "s", "t")):
        with pytest.raises(UserError, match=f"field '{name}' of its run.json is '{old}'; expected '{new}'"):
            checked(data, tmp_path, **{name: new}, resume="last")


def test_another_adapter_under_the_same_name_is_another_run(data, tmp_path):
    from distill.files import UserError
    from distill.train.run_folder import start_run

    sft = checkpoint(tmp_path / "sft", 1)
    start_run(checked(data, tmp_path, inputs={"init_adapter": sft}))
    checkpoint(tmp_path, 4)
    assert checked(data, tmp_path, resume="last", inputs={"init_adapter": sft}).checkpoint
    (sft / "adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match=r"field 'init_adapter_sha256' of its run.json is"):
        checked(data, tmp_path, resume="last", inputs={"init_adapter": sft})


def test_a_readme_that_is_not_from_a_run_is_not_overwritten(data, tmp_path):
    from distill.files import UserError

    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"its README.md is not from a run; expected a --save_dir of its own"):
        checked(data, tmp_path)


def test_distribution_loss_by_hand():
    from kd_train import distribution_loss

    scores = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # students (1/4, 3/4) and (1/2, 1/2)
    teacher, gold = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, -1])
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert distribution_loss(scores, teacher, gold, 1.0, 0.0).item() == pytest.approx(kl / 2, abs=1e-6)
    mixed = 0.7 * kl + 0.3 * math.log(4)  # the second row has no gold label, so alpha does not touch it
    assert distribution_loss(scores, teacher, gold, 1.0, 0.3).item() == pytest.approx(mixed / 2, abs=1e-6)
    soft = [1 / (1 + 3**0.5), 3**0.5 / (1 + 3**0.5)]  # at temperature 2
    hot = 4 * sum(0.5 * math.log(0.5 / q) for q in soft)
    assert distribution_loss(scores, teacher, gold, 2.0, 0.0).item() == pytest.approx(hot / 2, abs=1e-6)


def test_the_micro_batch_is_halved_until_it_fits():
    from distill.files import UserError
    from distill.train.memory import hint
    from distill.train.out_of_memory import largest_fitting

    tried = []

    def step(n, fits=4):
        tried.append(n)
        if n > fits:
            raise torch.OutOfMemoryError

    assert largest_fitting(step, 24, "") == 4 and tried == [24, 12, 8, 6, 4]
    with pytest.raises(UserError, match="one row does not fit this GPU; expected a smaller --max_len"):
        largest_fitting(lambda n: step(n, 0), 2, hint("nf4"))


def test_ema_by_hand():
    from distill.train.ema import EmaOfWeights

    trainer = EmaOfWeights()
    trainer.trainable = [torch.nn.Parameter(torch.tensor([1.0, 0.0])), torch.nn.Parameter(torch.tensor(8.0))]
    for value in (1.0, 2.0, 4.0):
        trainer.trainable[0].data[0] = value
        trainer.update_ema(10)  # a span of 1.8 steps: 1, then 1 + (2 - 1) / 1.8, then 1.5556 + (4 - 1.5556) / 1.8
    with trainer.ema_weights():
        assert trainer.trainable[0].tolist() == pytest.approx([2.9136, 0.0], abs=1e-4)
        assert trainer.trainable[1].item() == 8.0
    assert trainer.trainable[0].tolist() == [4.0, 0.0]


def test_the_ema_is_evaluated_and_saved_and_training_continues_from_the_weights(tiny, task, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr("distill.train.ema.SPAN", 2.0)  # of 2 steps: the EMA is 3/4 of the first and 1/4 of the last
    last, _, trainer = weights_after("sft", tiny, task, tmp_path)
    trainer.save_model(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ema = {name: value for (name, _), value in zip(named(trainer), trainer.ema, strict=True)}
    assert any((ema[name] - last[name]).abs().max() > 1e-3 for name in last)
    for name, value in ema.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], value)
    rows = trainer.train_dataset
    loss = trainer.evaluate(rows)["eval_loss"]
    trainer.swap_ema()
    weights, trainer.ema = trainer.ema, None
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, abs=1e-6)
    trainer.ema = weights
    trainer.swap_ema()
    trainer.ema = None
    assert abs(trainer.evaluate(rows)["eval_loss"] - loss) > 1e-3


def named(trainer):
    return [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]


def rows_for(route, tokenizer, task, n=12):
    """n encoded rows of different lengths, and the columns that a trainer of the route takes."""
    from distill.train.data import encode

    labels = [task.labels[i % 3] for i in range(n)]
    rows = [
        {
            "prompt": task.prompt(f"Age: {20 + i}.0" + ", Outstanding Debt: 99.0" * (i % 3)),
            "chosen": label if route == "sft" else f"{label}{', indeed' * (i % 5)}",
            "rejected": task.labels[(i + 1) % 3],
            "teacher": [0.7, 0.2, 0.1],
            "gold": -1,
        }
        for i, label in enumerate(labels)
    ]
    columns = {
        "sft": ["input_ids", "labels"],
        "kd": ["prompt_ids", "teacher", "gold"],
        "dpo": ["prompt_ids", "chosen_ids", "rejected_ids"],
    }
    return encode(tokenizer, rows, 1024, "prompt", "chosen", "rejected")[0], columns[route]


def make_trainer(route, tiny, task, folder, gpus=1):
    """A trainer of two steps of 2 x 6 rows, without dropout."""
    from trl import DPOConfig, SFTConfig, SFTTrainer

    from common import label_trie, load_base
    from distill.train.data import dataset
    from distill.train.label_distribution import LabelTrainer
    from distill.train.student import lora_config
    from distill.train.trainer import StudentTrainer
    from dpo_train import dpo_trainer_class
    from kd_train import distribution_loss

    class Sequence(StudentTrainer, SFTTrainer):
        pass

    model, tokenizer = load_base(tiny, "fp32")
    options = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "activation_checkpointing": False,
        "max_length": None,
        "logging_steps": 1,
    }
    if route == "dpo":
        kind = dpo_trainer_class()
        config = DPOConfig(**options, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 2.0])
    else:
        kind = Sequence
        if route == "kd":
            loss = partial(distribution_loss, temperature=1.0, alpha=0.0)
            kind = partial(LabelTrainer, trie=label_trie(tokenizer, task.labels), loss=loss)
            options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        config = SFTConfig(**options, shuffle_dataset=False)
    config._n_gpu = gpus
    adapter = lora_config(model, str(tiny), 4)
    adapter.lora_dropout = 0.0
    rows, columns = rows_for(route, tokenizer, task)
    data = dataset(rows, *columns)
    torch.manual_seed(0)
    return kind(
        model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter, train_rows=rows
    )


def weights_after(route, tiny, task, folder, upset=None, gpus=1):
    """LoRA weights and loss after its two steps, and the trainer; upset(model) breaks the model before training."""
    trainer = make_trainer(route, tiny, task, folder, gpus)
    if upset:
        upset(trainer.model.get_base_model().model)
    loss = trainer.train().training_loss
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, loss, trainer


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_rows_at_once_are_those_whose_step_fits(tiny, task, tmp_path, capsys, route):
    from distill.train.out_of_memory import fit_micro_batch

    trainer, sizes = make_trainer(route, tiny, task, tmp_path), []

    def too_large(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 0.6 * sizes[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = trainer.model.get_base_model().model.register_forward_pre_hook(too_large, with_kwargs=True)
    fit_micro_batch(trainer)
    hook.remove()
    found = trainer.args.per_device_train_batch_size
    assert len(sizes) > 1 and found < 6 and trainer.args.gradient_accumulation_steps * found == 12
    assert "6 rows at once do not fit this GPU" in capsys.readouterr().out
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_out_of_memory_halves_the_rows_at_once_and_changes_nothing_else(tiny, task, tmp_path, capsys, route, where):
    """The second micro-batch and all later ones are too large: its rows come in parts, its step is the same step."""
    seen = []

    def upset(model):
        def too_large(module, args, kwargs):
            seen.append(kwargs["input_ids"].numel())
            if len(seen) > 1 and seen[-1] > 0.75 * seen[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        def too_large_backward(module, *_):
            if len(seen) > 1 and seen[-1] > 0.75 * seen[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        if where == "forward":
            model.register_forward_pre_hook(too_large, with_kwargs=True)
        else:  # the upper layer has its gradients by then
            model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
            model.layers[0].register_full_backward_hook(too_large_backward)

    expected, loss, _ = weights_after(route, tiny, task, tmp_path / "a")
    found, same, trainer = weights_after(route, tiny, task, tmp_path / "b", upset)
    assert all(w.any() for w in expected.values())  # both steps moved every matrix, so there is something to compare
    assert trainer.parts > 1 and "out of memory at step 1: " in capsys.readouterr().out
    assert abs(loss - same) < 1e-5 and max((expected[n] - found[n]).abs().max() for n in expected) < 1e-5
    assert trainer.state.global_step == 2


def test_one_process_uses_one_of_several_gpus_and_says_so(tiny, task, tmp_path, capsys):
    """Left to the Trainer, a copy on each of them would multiply the batch and meet weights of the first one."""
    _, _, trainer = weights_after("sft", tiny, task, tmp_path, gpus=2)
    assert "one of 2 GPUs is used; all of them: accelerate launch" in capsys.readouterr().out
    assert trainer.args.train_batch_size == 6 and not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_one_row_that_does_not_fit_says_what_to_change(tiny, task, tmp_path):
    from distill.files import UserError

    def upset(model):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        model.register_forward_pre_hook(full)

    with pytest.raises(UserError, match=r"one row does not fit this GPU; .* --precision nf4"):
        weights_after("sft", tiny, task, tmp_path, upset)


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_a_loss_that_is_not_finite_stops_the_run(tiny, task, tmp_path, route):
    from distill.files import UserError

    def upset(model):
        model.norm.register_forward_hook(lambda module, args, out: out * torch.nan)

    with pytest.raises(UserError, match="step 1: the loss is nan; expected a smaller --lr"):
        weights_after(route, tiny, task, tmp_path, upset)


def test_weights_that_are_not_finite_are_not_written(data, tmp_path):
    from distill.files import UserError
    from distill.train.run_folder import finish_run

    weights = {f"lora_B.{i}": torch.ones(2, 2) for i in range(2)}
    weights["lora_B.1"][0, 0] = torch.nan
    with pytest.raises(UserError, match=r"lora_B\.1 holds NaN or infinity, so it is not written"):
        finish_run(checked(data, tmp_path / "a"), None, weights, {}, hashes={"x"}, history=[])
    assert not (tmp_path / "a").exists()


def test_text_is_chosen_by_the_tokens_that_greedy_decoding_would_write(tiny, task, tmp_path):
    from distill.train.arguments import best_metric

    assert best_metric(True, learns_text=True) == "eval_label_log_loss"
    assert best_metric(False, learns_text=True) == "eval_mean_token_accuracy"
    assert best_metric(False, learns_text=False) == "eval_loss"
    _, _, trainer = weights_after("sft", tiny, task, tmp_path)
    rows = trainer.train_dataset
    found = trainer.evaluate(rows)["eval_mean_token_accuracy"]
    size, shares = trainer.args.eval_batch_size, []
    with trainer.ema_weights(), torch.no_grad():
        for start in range(0, len(rows), size):
            right = []
            for ids, labels in zip(*(rows[start : start + size][k] for k in ("input_ids", "labels")), strict=True):
                top = trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1)
                right += [t == y for t, y in zip(top.tolist(), labels[1:], strict=True) if y != -100]
            shares.append(sum(right) / len(right))
    assert 0 < found == pytest.approx(sum(shares) / len(shares), abs=1e-6)
