"""A run that is stopped, anywhere, and resumed is the run that was not stopped; and no run is replaced unasked."""

import argparse
import contextlib
import io
import json
import os
import random
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from distill.files import UserError, write_json
from distill.model.hub import base_config, unfinished_run
from distill.train.run_folder import RUN_FILES, check_folder, check_run, finished_run, start_run


@pytest.fixture(scope="module")
def rows(tmp_path_factory, task):
    """creditmix_sft.jsonl of 60 easy rows with its task file."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    task.save(folder / "creditmix_task.json")
    with open(folder / "creditmix_sft.jsonl", "w") as f:
        for i in range(60):
            label = rng.choice(task.labels)
            text = task.prompt(f"Age: {rng.randint(18, 60)}.0, Outstanding Debt: {task.labels.index(label)}{i:03}.0")
            f.write(json.dumps({"input": text, "output": label, "group": str(i)}) + "\n")
    return folder / "creditmix_sft.jsonl"


@pytest.fixture(scope="module")
def train(tiny, rows):
    """train(folder, stop_before=None, *flags): sft_train.main in this process -> (exit code, kinds of forward passes).

    stop_before: the number of the forward pass that Ctrl-C comes just before. A kind is "train" or "evaluate".
    """
    import sft_train
    from distill.train import callbacks
    from distill.train.arguments import add_arguments, add_swap_argument

    def start(folder, stop_before=None, *flags):
        parser, kinds = argparse.ArgumentParser(), []
        add_arguments(parser, "sft")
        add_swap_argument(parser)
        fixed = {"student": tiny, "data": rows, "save_dir": folder, "lr": 0.01, "max_steps": 7, "batch_size": 8}
        fixed |= {"micro_batch": 4, "dev_rows": 8, "eval_steps": 3}
        flags = [*(str(x) for k, v in fixed.items() for x in (f"--{k}", v)), *flags]

        def before_forward(stop, *_):
            kinds.append("train" if torch.is_grad_enabled() else "evaluate")
            if len(kinds) == stop_before:
                os.kill(os.getpid(), signal.SIGINT)
            original(stop)

        original, handlers = callbacks.StopOnSignal.before_forward, [signal.getsignal(n) for n in (2, 15)]
        callbacks.StopOnSignal.before_forward = before_forward
        try:
            sft_train.main(parser.parse_args(flags))
            return 0, kinds
        except SystemExit as e:
            return e.code, kinds
        finally:
            callbacks.StopOnSignal.before_forward = original
            for number, handler in zip((2, 15), handlers, strict=True):
                signal.signal(number, handler)

    return start


def result(folder):
    """What a run leaves that must not depend on where it was stopped."""
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    return load_file(folder / "adapter_model.safetensors"), record


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """(adapter, run.json, kinds of forward passes, output) of 7 steps of 2 micro-batches, evaluated at 3, 6 and 7."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code, kinds = train(folder / "a")
    assert code == 0
    return *result(folder / "a"), kinds, output.getvalue()


PLACES = {  # number of the forward pass, and the step that the checkpoint is of
    "the second micro-batch of step 3": lambda kinds: ([i for i, k in enumerate(kinds) if k == "train"][5], 2),
    "the evaluation of step 3": lambda kinds: (kinds.index("evaluate"), 3),
    "the label scores of step 3": lambda kinds: ([i for i, k in enumerate(kinds) if k == "train"][6] - 1, 3),
    "the evaluation of the last step": lambda kinds: ([i for i, k in enumerate(kinds) if k == "train"][13] + 1, 7),
    "the scores for the calibration": lambda kinds: (len(kinds) - 1, 7),
}


@pytest.mark.parametrize("place", PLACES)
def test_stopped_at_any_forward_pass_and_resumed(train, whole, tmp_path, capsys, place):
    adapter, record, kinds, _ = whole
    index, step = PLACES[place](kinds)
    code, seen = train(tmp_path / "a", index + 1)
    assert code == 128 + signal.SIGINT and len(seen) == index + 1  # no forward pass after the signal
    assert f"stopped at step {step}; the same command with --resume_from" in capsys.readouterr().out
    assert (tmp_path / "a" / f"checkpoint-{step}").is_dir() and not (tmp_path / "a" / "run.json.tmp").exists()
    code, _ = train(tmp_path / "a", None, "--resume_from_checkpoint", "last")
    found, again = result(tmp_path / "a")
    assert code == 0 and all(torch.equal(adapter[k], found[k]) for k in adapter)
    assert again["train_loss"] == pytest.approx(record["train_loss"], rel=1e-6)
    assert again["best"] == record["best"] and again["steps"] == record["steps"] and again["dev"] == record["dev"]


def test_stopped_in_the_first_step_nothing_is_saved(train, tmp_path, capsys):
    code, _ = train(tmp_path / "a", 2)
    assert code == 130 and "stopped before the first step was done" in capsys.readouterr().out
    assert "an unfinished run without a checkpoint; it begins again with: python" in unfinished_run(tmp_path / "a")
    assert train(tmp_path / "a", 2)[0] == 130  # the same command starts again


def test_a_run_resumed_from_its_last_step_takes_no_other(train, tmp_path, whole):
    """7 steps are not whole passes over the 51 rows, so the loop would enter the second pass again."""
    train(tmp_path / "a", len(whole[2]))
    _, kinds = train(tmp_path / "a", None, "--resume_from_checkpoint", "last")
    assert "train" not in kinds and result(tmp_path / "a")[1]["steps"] == 7


def test_a_run_says_once_how_long_it_will_take(whole):
    lines = [line for line in whole[3].splitlines() if line.startswith("about ")]
    assert len(lines) == 1 and re.match(
        r"about \S+ s for 7 steps of 8 rows \(\S+ s a step; 3 evaluations of 4 rows, \S+ s each\); shorter with fewer",
        lines[0],
    )
    before, after = whole[3].split("\nabout ")
    assert "step 2: loss" in before and "step 4: loss" in after


def test_an_unfinished_run_names_its_checkpoints_and_the_command(tmp_path):
    folder = tmp_path / "run"
    write_json(folder / "run.json", {"status": "started", "command": "python sft_train.py --lr 0.1"})
    for step in (8, 12, 100):
        write_json(folder / f"checkpoint-{step}" / "trainer_state.json", {})
    (folder / "checkpoint-110").mkdir()  # killed while it was written
    with pytest.raises(UserError) as e:
        base_config(folder)
    assert str(e.value) == (
        f"{folder}: an unfinished run; it goes on with: python sft_train.py --lr 0.1 --resume_from_checkpoint last "
        f"(so far: {folder}/checkpoint-8, {folder}/checkpoint-12, {folder}/checkpoint-100)"
    )


def test_a_lane_with_an_unfinished_run_says_so(tmp_path):
    from types import SimpleNamespace

    from distill.serve.models import LabelModels

    write_json(tmp_path / "run.json", {"status": "started", "command": "python sft_train.py"})
    server = SimpleNamespace(settings=SimpleNamespace(base="b", task=None))
    with pytest.raises(UserError, match="an unfinished run without a checkpoint"):
        LabelModels._add(server, "sft", tmp_path, "a")


def checked(rows, folder, **more):
    settings = {"lr": 0.1, "save_dir": folder, "overwrite": more.get("overwrite", False)}
    return check_run("sft", folder, student="s", data=rows, settings=settings, **more)


def finished(folder, **more):
    """A folder with a finished run's files."""
    for name in RUN_FILES:
        write_json(folder / name, {})
    record = {"status": "finished", "student": "smollm2-135m", "rows": 640, "date": "2026-11-28T03:00:00+00:00"}
    write_json(folder / "run.json", {**record, **more})
    (folder / "mine.txt").write_text("kept")
    return folder


def test_a_finished_run_is_replaced_only_when_asked(rows, tmp_path):
    folder = finished(tmp_path / "a")
    with pytest.raises(UserError) as e:
        checked(rows, folder)
    assert str(e.value) == (
        f"{folder}: a finished run stands here (base smollm2-135m, 640 rows, 2026-11-28); "
        "expected another --save_dir, or --overwrite to replace it"
    )
    with pytest.raises(UserError, match="a finished run stands here"):
        checked(rows, folder, resume="last", overwrite=True)
    assert {p.name for p in folder.iterdir()} == {*RUN_FILES, "mine.txt"}  # checks remove nothing
    (folder / "checkpoint-3").mkdir()
    write_json(folder / "checkpoint-3" / "trainer_state.json", {})
    write_json(folder / "tensorboard" / "events.out.tfevents.1", {})  # a curve of two runs is of neither
    start_run(checked(rows, folder, overwrite=True))
    assert {p.name for p in folder.iterdir()} == {"run.json", "mine.txt"}
    assert json.loads((folder / "run.json").read_text())["status"] == "started"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_adapter_is_written_into_a_whole_model(tmp_path, name):
    write_json(tmp_path / name, {})
    for flags in ({}, {"overwrite": True}, {"resume": "last"}):
        with pytest.raises(UserError, match=f"a whole model stands here \\({name}\\); expected another --save_dir"):
            check_folder(tmp_path, **flags)


@pytest.mark.parametrize("record", [[], {"name": "another program's"}])
def test_a_run_json_of_something_else_is_replaced_only_when_asked(rows, tmp_path, record):
    write_json(tmp_path / "run.json", record)
    with pytest.raises(UserError, match=r"run\.json: not the record of a run; expected another --save_dir, or --overw"):
        checked(rows, tmp_path)
    assert checked(rows, tmp_path, overwrite=True)


def test_a_file_is_no_folder_for_a_run(rows, tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"--save_dir {folder}: {tmp_path}/file is a file; expected a folder"):
            checked(rows, folder)


def test_overwrite_never_removes_what_the_run_starts_from(rows, tmp_path):
    folder = finished(tmp_path / "a")
    with pytest.raises(UserError, match="--overwrite would remove --init_adapter"):
        checked(rows, folder, overwrite=True, inputs={"init_adapter": folder, "teacher": None})


def test_a_run_killed_while_it_was_written_is_not_finished(rows, tmp_path):
    folder = finished(tmp_path / "a", status="started")
    assert finished_run(folder) is None and checked(rows, folder)


def test_the_loss_of_a_run_is_the_mean_over_its_steps():
    from distill.train.run import mean_loss

    history = [{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 1.0}]
    assert mean_loss([*history, {"step": 3, "train_loss": 0.5}]) == 3.0 and mean_loss([]) == 0.0
