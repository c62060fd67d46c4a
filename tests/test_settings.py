"""What a trainer chooses where no flag says it, and how long it says a run will take."""

from types import SimpleNamespace

import pytest
import torch

from distill.train.arguments import choose_settings, training_arguments
from distill.train.duration import SayDuration, duration_line, in_words


def config(hidden, layers):
    """A configuration with the width and depth that tell a small model from a large one."""
    text = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers)
    return SimpleNamespace(get_text_config=lambda: text)


SMOLLM2, QWEN_3B = config(576, 30), config(2048, 36)


def rows(n, characters=400):
    return [{"input": "x" * (characters - 4), "output": "Good", "row_number": i} for i in range(n)]


def test_defaults_follow_size_and_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_settings("sft", SMOLLM2, rows(9000)) == (1e-3, 16, 3, None)
    assert choose_settings("kd", QWEN_3B, rows(9000, 4000)) == (2e-4, 16, 3, None)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_settings("sft", SMOLLM2, rows(9000)) == (2e-3, 16, 3, 200)
    expected = "200 steps of 16 rows, the default on a CPU; --epochs 3 would be 1687 steps\n"
    assert capsys.readouterr().out == expected
    assert choose_settings("dpo", QWEN_3B, rows(1066)) == (1e-4, 16, 3, None)  # three passes are 199 steps
    assert choose_settings("kd", QWEN_3B, rows(9)) == (2e-4, 16, 3, None)
    assert choose_settings("sft", SMOLLM2, rows(90, 2500)) == (2e-3, 3, 3, None)  # documents
    assert choose_settings("sft", SMOLLM2, rows(9, 20_000))[1] == 1


def test_what_is_given_wins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_settings("sft", SMOLLM2, rows(9000), 2e-4, 16, 2.0, None) == (2e-4, 16, 2.0, None)
    assert choose_settings("sft", SMOLLM2, rows(9000), 2e-4, 4, None, 500) == (2e-4, 4, 3, 500)


def test_the_steps_of_a_run_are_those_that_transformers_takes(tmp_path, monkeypatch, capsys):
    """Each pass over 898 rows ends with a step of two rows: 57 steps, not 56."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # set by the call
    fixed = {"batch_size": 16, "micro_batch": 16, "learning_rate": 1e-3, "eval_steps": None, "seed": 1}
    fixed |= {"evaluate": True, "best_metric": "eval_loss", "precision": "fp32"}
    for epochs, max_steps, steps in ((3, None, 171), (0.001, None, 1), (3, 40, 40)):
        training_arguments(tmp_path, rows=898, epochs=epochs, max_steps=max_steps, **fixed)
        assert capsys.readouterr().out.startswith(f"{steps} steps of 16 x 1 accumulated")


def test_the_duration_by_hand():
    # 80 * 9 s of steps; a row without gradients takes 9 / 8 / 3 s, 60 of them twice an evaluation and once at the end
    line = duration_line(9.0, steps=80, batch_size=8, evaluations=2, dev_rows=60, scored=True, long_rows=False)
    assert line == (
        "about 14 minutes for 80 steps of 8 rows (9 s a step; 2 evaluations of 60 rows, 45 s each); "
        "shorter with fewer --max_steps, a smaller --batch_size or fewer --dev_rows"
    )
    line = duration_line(123.0, steps=200, batch_size=16, evaluations=0, dev_rows=0, scored=False, long_rows=True)
    assert line == (
        "about 6.8 hours for 200 steps of 16 rows (2 minutes a step); "
        "shorter with fewer --max_steps, a smaller --batch_size or a smaller --max_len, which drops the longest rows"
    )
    assert [in_words(s) for s in (0.154, 9.24, 89.0, 91.0, 5399.0)] == [
        "0.15 s",
        "9.2 s",
        "89 s",
        "2 minutes",
        "90 minutes",
    ]


def test_the_first_step_is_not_timed(monkeypatch, capsys):
    """Steps of 100, 2 and 4 seconds, resumed at step 10: three evaluations at 12, 16 and 18 are left."""
    clock = iter([0, 100, 200, 202, 300, 304, 400, 401])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    rows = [{"input_ids": [0] * n} for n in (5, 5, 30)]
    trainer = SimpleNamespace(train_rows=rows, dev_rows=[], task=None, is_world_process_zero=lambda: True)
    args = SimpleNamespace(eval_strategy="steps", train_batch_size=2, gradient_accumulation_steps=3, world_size=2)
    state, say = SimpleNamespace(global_step=10, max_steps=18, eval_steps=4), SayDuration(trainer)
    say.on_train_begin(args, state, None)
    for _ in range(4):
        say.on_step_begin(args, state, None)
        state.global_step += 1
        say.on_step_end(args, state, None)
    line, end = capsys.readouterr().out.split("\n")
    assert line.startswith("about 24 s for 8 steps of 12 rows (3 s a step; 3 evaluations of 0 rows") and not end
    assert "--max_len" in line


@pytest.mark.parametrize("seconds", [[3.0], [3.0, 1.0]])
def test_a_run_of_few_steps_says_nothing(capsys, seconds):
    say = SayDuration(SimpleNamespace())
    say.seconds, say.began = list(seconds), 0.0
    say.on_step_end(None, SimpleNamespace(global_step=3, max_steps=3), None)
    assert capsys.readouterr().out == ""
