"""Swap augmentation of label rows, and the trainers that use it."""

import json
from collections import Counter

import pytest

from common import prompt_of, row_hash
from distill.files import UserError
from distill.tasks.augment import swap_label_rows
from distill.train.arguments import passes_over


def swapped(rows, task, share, passes, seed):
    return swap_label_rows(rows, task, prompt="input", label="output", share=share, passes=passes, seed=seed)


def rows_of(task, n=40):
    """n rows; row i alone shows the numbers i and 1000 + i, and has the label i % 3."""
    texts = [f"Age: {i}.0, Occupation: Job_{i}, Outstanding Debt: {1000 + i}.50" for i in range(n)]
    return [
        {"input": task.prompt(t), "output": task.labels[i % len(task.labels)], "group": str(i)}
        for i, t in enumerate(texts)
    ]


def test_values_come_from_rows_of_the_same_label_and_field(task):
    rows, owner = rows_of(task), {}
    for i, row in enumerate(rows):
        owner |= dict.fromkeys([f"Age: {i}.0", f"Occupation: Job_{i}", f"Outstanding Debt: {1000 + i}.50"], row)
    noisy = swapped(rows, task, 0.5, 5, seed=1)
    assert len(noisy) == 200 and Counter(r["group"] for r in noisy) == Counter({str(i): 5 for i in range(40)})
    kept = 0
    for row in noisy:
        head, tail = task.template.split("{input}")
        shown = row["input"].removeprefix(head).removesuffix(tail).split(", ")
        assert [s.split(":")[0] for s in shown] == ["Age", "Occupation", "Outstanding Debt"]
        assert all(owner[s]["output"] == row["output"] for s in shown)
        kept += sum(owner[s]["group"] == row["group"] for s in shown)
    # of 600 fields a half stays, and 1/13 of the other half draws itself: 323 expected, 12.2 its standard deviation
    assert abs(kept - 323) < 50


def test_share_0_changes_nothing_and_the_seed_decides(task):
    rows = rows_of(task)
    assert swapped(rows, task, 0.0, 1, seed=1) == rows
    first, again, other = (swapped(rows, task, 0.7, 1, seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("max_steps", "epochs", "passes"), [(None, 3, 3), (None, 2.5, 3), (10, 3, 2), (11, 1, 3)])
def test_as_many_copies_as_the_run_makes_passes(task, max_steps, epochs, passes):
    rows = [{**row, "hashes": [str(i)]} for i, row in enumerate(rows_of(task))]
    assert passes_over(len(rows), epochs=epochs, max_steps=max_steps, batch_size=8) == passes
    copies = swapped(rows, task, 0.9, passes, seed=1)
    assert len(copies) == 40 * passes and copies[0]["input"] != copies[40]["input"]
    assert [r["hashes"] for r in copies] == [r["hashes"] for r in rows] * passes  # what an evaluation compares


def test_texts_without_fields_are_refused(task):
    rows = [{"input": task.prompt("free text"), "output": "Good"}]
    with pytest.raises(UserError, match="expected texts like 'Key: value, Key: value', got 'free text'"):
        swapped(rows, task, 0.5, 1, 0)
    with pytest.raises(UserError, match="expected a label task"):
        swapped(rows, None, 0.5, 1, 0)


@pytest.mark.parametrize("route", ["sft", "dpo"])
def test_a_trainer_draws_each_pass_anew_and_records_the_rows_as_they_were(run, tiny, task, jsonl, tmp_path, route):
    rows = rows_of(task)
    if route == "dpo":
        other = {label: task.labels[i - 1] for i, label in enumerate(task.labels)}
        rows = [{"prompt": r["input"], "chosen": r["output"], "rejected": other[r["output"]]} for r in rows]
    data = jsonl(f"creditmix_{route}.jsonl", rows)
    task.save(tmp_path / "creditmix_task.json")
    flags = ["--student", tiny, "--data", data, "--save_dir", tmp_path / "a", "--epochs", 2, "--batch_size", 8]
    done = run(f"{route}_train.py", *flags, "--swap_noise", 0.5, "--dev_rows", 4, "--lr", 0.01)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    hashes = set((tmp_path / "a" / "train_rows.txt").read_text().split())
    assert hashes <= {row_hash(prompt_of(row)) for row in rows}  # of the originals, not of the copies
    trained = len(hashes)
    assert record["args"]["swap_noise"] == 0.5 and 30 <= trained <= 39
    assert record["steps"] == -(-2 * trained // 8)  # two passes as asked, not two times two
    card = (tmp_path / "a" / "README.md").read_text().splitlines()
    again = next(line for line in card if f"{route}_train.py" in line).split()[2:]  # the command in the card
    again[again.index("--save_dir") + 1] = str(tmp_path / "c")
    assert "--swap_noise" in again and run(f"{route}_train.py", *again).returncode == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ac")
    assert one == two

    refused = run(f"{route}_train.py", *flags[:4], "--save_dir", tmp_path / "b", "--swap_augmentation", 1.5)
    assert refused.returncode == 2 and "from 0 to 1" in refused.stderr
