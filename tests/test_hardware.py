"""What a process may take of the machine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from common import Calibration, LabelScorer, Task, load_model
from distill.files import ROOT, read_json
from distill.hardware import bf16_gain, choose_precision, default_cap


def test_under_wsl2_a_part_of_the_card_stays_free_and_a_note_says_why():
    cap, note = default_cap(8.0, "5.15.167.4-microsoft-standard-WSL2")
    assert cap == pytest.approx(7.2)
    assert note.startswith("WSL2: using at most 7.2 of 8.0 GiB") and "10 to 50 times slower" in note
    assert default_cap(8.0, "6.8.0-48-generic") == (8.0, "")


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


SMALL, LARGE = Config(hidden_size=576, num_hidden_layers=30), Config(hidden_size=2048, num_hidden_layers=36)


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.0, ("fp32", "a CPU without bf16 instructions")),
        (0.52, ("fp32", "a CPU whose products in bf16 are 0.5 times as fast")),  # AVX512-BF16 at half the rate of fp32
        (1.2, ("fp32", "a CPU whose products in bf16 are 1.2 times as fast")),  # the rest of a pass gains nothing
        (1.96, ("bf16", "a CPU whose products in bf16 are 2.0 times as fast")),
    ],
)
def test_a_cpu_computes_in_bf16_where_that_is_faster(monkeypatch, gain, expected):
    monkeypatch.setattr("distill.hardware.device", lambda: "cpu")
    monkeypatch.setattr("distill.hardware.bf16_gain", lambda: gain)
    assert choose_precision(SMALL) == expected
    assert choose_precision(SMALL, "fp32") == ("fp32", "as asked")
    assert choose_precision(LARGE) == ("nf4", "a large model on a CPU")


def test_the_gain_of_bf16_is_measured_where_there_are_instructions(monkeypatch):
    measure, clock, ticks = bf16_gain.__wrapped__, [0.0], iter([2, 4, 3, 4, 4, 4, 9, 1, 2, 2, 2, 2])
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert measure() == 0
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("distill.hardware.time.thread_time", lambda: clock[0])

    def linear(x, weight):
        clock[0] += next(ticks)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert measure() == 3 / 1  # the best of each, the first product left out


def test_the_shipped_adapter_says_the_same_in_bf16():
    folder, found = ROOT / "runs" / "smollm2_sft", []
    task = Task.load(folder / "task.json")
    calibration = Calibration.load(folder, task)
    prompts = [task.prompt(row["question"]) for row in read_json(ROOT / "data" / "creditmix_dataset.json")[:1200:150]]
    for precision in ("fp32", "bf16"):
        scorer = LabelScorer(*load_model(folder, precision), task.labels, task.null_prompts())
        found.append(softmax(calibration(scorer.score(prompts), scorer.prior(task)), 1))
    assert (found[0].argmax(1) == found[1].argmax(1)).all() and len(set(found[0].argmax(1))) > 1
    assert 0 < np.abs(found[0] - found[1]).max() < 0.1
