"""On-policy KD: what the student samples, rounds that a kill does not change, and a loss that falls."""

import json
import math
import os
import runpy
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from teaching import flags

from common import load_model, prompt_ids
from distill.files import ResumableJsonl, UserError
from distill.model.hub import base_config
from distill.train import student_samples, teachers
from distill.train.student_samples import encode_sample, prompts_under, repeated, sample_student


def questions(n):
    return [{"input": f"Say something about {i}", "row_number": i + 1, "hashes": [f"h{i}"]} for i in range(n)]


def test_prompts_are_repeated_in_one_order_and_long_ones_are_dropped(tiny):
    rows = questions(5)
    order = repeated(rows, 12, seed=3)
    assert (
        order[:5] == order[5:10]
        and order[10:] == order[:2]
        and {r["input"] for r in order} == {r["input"] for r in rows}
    )
    assert repeated(rows, 12, seed=4) != order
    tokenizer = load_model(tiny, "fp32")[1]
    kept, dropped = prompts_under(tokenizer, [*rows, {"input": "word " * 50}], 60)
    assert [r["prompt_ids"] for r in kept] == prompt_ids(tokenizer, [r["input"] for r in rows])
    assert dropped == {"prompt of 60 tokens or more": 1}


def test_a_sample_keeps_the_tokens_that_were_drawn():
    row = {**questions(1)[0], "prompt_ids": [1, 2, 3], "teacher_output": "not this"}
    encoded = encode_sample(row, {"tokens": [7, 8, 2], "ended": True})
    assert encoded["input_ids"] == [1, 2, 3, 7, 8, 2] and encoded["labels"] == [-100, -100, -100, 7, 8, 2]
    assert encoded["texts"] == [([1, 2, 3, 7, 8, 2], 3)] and encoded["hashes"] == ["h0"]
    assert "teacher_output" not in encoded  # the teacher's template is not asked to write it


def test_samples_that_a_kill_left_are_kept_and_the_rest_is_what_it_would_have_been(tiny, tmp_path):
    rows, _ = prompts_under(load_model(tiny, "fp32")[1], questions(6), 60)
    sample = partial(sample_student, tiny, "fp32", rows, 60, "1:0")
    whole = sample(tmp_path / "whole.jsonl")
    assert len({tuple(r["input_ids"]) for r in whole}) == 6 and all(len(r["input_ids"]) <= 60 for r in whole)
    assert all(r["ended"] or len(r["input_ids"]) == 60 for r in whole)
    kept = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(kept[:2]) + kept[2][:9])
    assert sample(tmp_path / "part.jsonl") == whole
    assert sample_student(tiny, "fp32", rows, 60, "1:1", tmp_path / "next.jsonl") != whole  # another round, others
    (tmp_path / "model-gone").mkdir()
    assert sample_student(tmp_path / "model-gone", "fp32", rows, 60, "1:0", tmp_path / "whole.jsonl") == whole


def test_mean_loss_by_hand():
    from types import SimpleNamespace

    from distill.train.token_distribution import mean_loss
    from kd_train import token_loss

    class Model:  # token 3 has half of the probability, whatever came before
        device = "cpu"

        def __call__(self, input_ids, use_cache, logits_to_keep):
            logits = torch.tensor([0.0, math.log(2), 0.0, math.log(4)]).expand(1, logits_to_keep, 4)
            return SimpleNamespace(logits=logits)

    top_k = {0: (torch.tensor([[3, 0]] * 2), torch.tensor([[0.5, 0.3, 0.2]] * 2).log())}
    top_k[1] = (torch.tensor([[1, 2]]), torch.tensor([[0.25, 0.125, 0.625]]).log())  # the student's own
    rows = [
        {"row": 0, "input_ids": [1, 2, 1, 3], "labels": [-100, -100, 1, 3]},
        {"row": 1, "input_ids": [1, 0], "labels": [-100, 0]},
    ]
    kl = 0.3 * math.log(0.3 / 0.125) + 0.2 * math.log(0.2 / 0.375)
    found = mean_loss(Model(), rows, top_k, partial(token_loss, temperature=1.0, alpha=0.0))
    assert found == pytest.approx((2 * kl + 0) / 3, abs=1e-6)


def test_a_run_that_cannot_be_on_policy_is_refused(task):
    local, asked = teachers.Teacher("some/model"), teachers.Teacher(teachers.BOOSTING)
    for teacher, labels, alpha, message in (
        (None, None, 0.0, "--on_policy: expected free text and --teacher MODEL"),
        (asked, None, 0.0, "--on_policy: expected free text"),
        (local, task, 0.0, "--on_policy: expected free text"),
        (local, None, 0.5, "--alpha 0.5: it is the weight of a given text, and --on_policy has none"),
    ):
        with pytest.raises(UserError, match=message):
            teachers.check_on_policy(teacher, labels, alpha)


@pytest.fixture(scope="module")
def pair(tiny, tiny_adapter, tmp_path_factory):
    """(student, teacher): random weights with something to tell apart, and an adapter on them."""
    model, tokenizer = load_model(tiny, "fp32")
    model.model.norm.weight.data.fill_(25)  # as it is, all tokens are about as likely
    student = tmp_path_factory.mktemp("student")
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    return student, tiny_adapter("on-policy teacher", base=student)


def train_in_rounds(pair, data, folder, resume=None):
    """Two rounds of 6 steps of 4 rows in this process; returns run.json."""
    from distill.train.arguments import training_arguments
    from distill.train.data import KDRow, read_training_rows
    from distill.train.on_policy import train_on_policy
    from distill.train.run_folder import check_run
    from kd_train import token_loss

    student, teacher = pair
    settings = {"save_dir": folder, "resume_from_checkpoint": resume}
    train_on_policy(
        check_run("kd", folder, student=str(student), data=data, settings=settings, resume=resume),
        teachers.Teacher(str(teacher), "fp32"),
        read_training_rows(data, KDRow, "teacher_output", None)[0],
        base_config(student),
        rounds=2,
        epochs=1.0,
        max_steps=12,
        batch_size=4,
        dev_rows=4,
        max_len=36,
        precision="fp32",
        lora_r=4,
        top_k=16,
        seed=1,
        loss=partial(token_loss, temperature=1.0, alpha=0.0),
        plan=lambda rows: 4,
        arguments=partial(training_arguments, folder, batch_size=4, learning_rate=0.01, seed=1),
    )
    return json.loads((folder / "run.json").read_text())


def test_rounds_lower_the_loss_on_own_samples_and_interruptions_change_nothing(pair, jsonl, tmp_path, monkeypatch):
    from distill.train import on_policy
    from distill.train.run_folder import checkpoints_in

    data = jsonl("notes_kd.jsonl", [{"input": f"Say: {i}", "group": str(i)} for i in range(40)])
    whole = train_in_rounds(pair, data, tmp_path / "a")
    losses = [r["loss"] for r in whole["rounds"]]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0], losses
    assert [r.get("answers") for r in whole["rounds"]] == [24, 24, None] and whole["steps"] == 12
    assert not (tmp_path / "a" / "rounds").exists() and not list((tmp_path / "a").glob("checkpoint-*"))

    def append(self, row):  # in the middle of a line of the second round's samples
        if self.path.parent.name == "2" and len(self.rows) == 9:
            with open(self.path, "a") as f:
                f.write('{"place": 4')
            raise KeyboardInterrupt
        ResumableJsonl.append(self, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(student_samples, "ResumableJsonl", type("Torn", (ResumableJsonl,), {"append": append}))
        train_in_rounds(pair, data, tmp_path / "b")
    with pytest.raises(UserError, match="expected --resume_from_checkpoint last"):
        train_in_rounds(pair, data, tmp_path / "b")

    class Stop(on_policy.StopAtStep):  # within a round: the checkpoint is between two of its ends
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control)
            if state.global_step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(on_policy, "StopAtStep", Stop)
        train_in_rounds(pair, data, tmp_path / "b", "last")
    assert [p.name for p in checkpoints_in(tmp_path / "b")] == ["checkpoint-6", "checkpoint-8"]
    other = train_in_rounds(pair, data, tmp_path / "b", "last")
    assert [r["loss"] for r in other["rounds"]] == losses
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_the_command_leaves_an_adapter_and_the_loss_of_each_round(pair, jsonl, tmp_path, monkeypatch, capsys):
    student, teacher = pair
    data = jsonl("notes_kd.jsonl", [{"input": f"Say: {i}", "group": str(i)} for i in range(20)])
    more = {"teacher": teacher, "on_policy": 2, "max_steps": 4, "max_len": 40, "lr": 0.01, "top_k": 4}
    monkeypatch.setattr("sys.argv", ["kd_train.py", *flags(student, data, tmp_path / "a", **more)])
    runpy.run_path("kd_train.py", run_name="__main__")
    out = capsys.readouterr().out
    assert "round 1 of 2: loss" in out and "after the last round: loss" in out
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["loss"] == "token distribution, on-policy" and len(record["rounds"]) == 3 and record["steps"] == 4
    assert len((tmp_path / "a" / "train_rows.txt").read_text().split()) == 16
    load_model(tmp_path / "a", "fp32")
