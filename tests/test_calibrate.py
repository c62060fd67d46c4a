"""The choice of a calibration on development rows, on numbers drawn so that the right answer is known."""

import json

import numpy as np
import pytest
from scipy.special import log_softmax

from common import Calibration, log_loss
from distill.calibrate import (
    choose_calibration,
    class_shares,
    class_weights,
    fit_and_save,
    fit_calibration,
    natural_shares,
    split_record,
    with_bias,
)
from distill.files import UserError, file_sha256


def drawn(n, seed=0, sharpness=1.5):
    """(calibrated scores [n, 3], classes [n] drawn from their softmax)."""
    rng = np.random.default_rng(seed)
    scores = log_softmax(sharpness * rng.normal(size=(n, 3)), axis=1)
    return scores, (scores + rng.gumbel(size=(n, 3))).argmax(1)


def test_fit_finds_bias_and_temperature_and_never_loses():
    scores, y = drawn(3000)
    raw = scores * 2 + np.array([0.0, 1.0, -1.0])
    fit = fit_calibration(raw, np.zeros(3), y)
    assert log_loss(fit(raw, np.zeros(3)), y) < log_loss(raw, y) - 0.1
    assert fit.b[1] - fit.b[0] == pytest.approx(-1.0, abs=0.3) and fit.b[2] - fit.b[0] == pytest.approx(1.0, abs=0.3)
    assert abs(fit.T - 2) < 0.2
    with pytest.raises(UserError, match="no development rows"):
        fit_calibration(raw[:0], np.zeros(3), y[:0])


def test_a_fit_is_for_the_class_mix_of_its_weights():
    """Rows of one class twice as often as in training: weights, and rows drawn like training, give the same fit."""
    scores, y = drawn(30000)
    rng = np.random.default_rng(1)
    kept = (y != 0) | (rng.random(len(y)) < 0.5)
    few, y_few = scores[kept], y[kept]
    shares = np.bincount(y) / len(y)
    weighted = fit_calibration(few, np.zeros(3), y_few, class_weights(y_few, shares))
    assert weighted.b == pytest.approx((0, 0, 0), abs=0.05) and abs(weighted.T - 1) < 0.05
    assert fit_calibration(few, np.zeros(3), y_few).b[0] < -0.3


def test_calibrated_scores_are_left_alone():
    """A fit on 300 rows of well calibrated scores only adds noise: it is rarely kept, so choosing costs far less."""
    prior, chosen, costs = np.array([-3.0, -1.0, -0.5]), [], []
    for seed in range(20):
        (scores, y), (new, y_new) = drawn(300, seed), drawn(3000, seed + 100)
        best, record = choose_calibration(scores, prior, y, np.arange(300) // 3)
        chosen.append(record["chosen"])
        assert record["chosen"] == "fitted" or best == Calibration(0.0, (0.0, 0.0, 0.0), 1.0, True)
        fits = (best, fit_calibration(scores, prior, y))
        costs.append([log_loss(fit(new, prior), y_new) - log_loss(new, y_new) for fit in fits])
    of_choice, of_fit = np.mean(costs, axis=0)
    assert chosen.count("raw") >= 14 and of_fit > 0.005 and of_choice < 0.7 * of_fit


def test_overconfident_scores_are_fitted():
    scores, y = drawn(300)
    fit, record = choose_calibration(scores * 3, np.zeros(3), y, np.arange(300) // 3)
    assert record["chosen"] == "fitted" and abs(fit.T - 3) < 0.6
    assert record["dev_log_loss_cv"]["fitted"] < record["dev_log_loss_cv"]["raw"]
    assert record["reason"].startswith("least log-loss, cross-validated over 100 groups: fitted 0.")


def test_null_scores_are_chosen_where_the_prior_is_the_bias():
    """The base model: what it says of content-free prompts is what has to be subtracted, and 40 rows fit no better."""
    scores, y = drawn(40, seed=3, sharpness=1.0)
    prior = np.array([-4.0, -0.5, -2.0])
    fit, record = choose_calibration(scores + prior, prior, y, np.arange(40))
    assert record["chosen"] == "null" and fit == Calibration(1.0, (0.0, 0.0, 0.0), 1.0, True)


def test_the_choice_counts_customers_not_rows():
    """Rows of a customer are copies: what a fit gains on a customer's other rows, it does not gain on other people."""
    kept = {"customers": 0, "rows": 0}
    for seed in range(20):
        scores, y = (np.repeat(x, 40, axis=0) for x in drawn(12, seed))
        for name, groups in (("customers", np.arange(480) // 40), ("rows", np.arange(480))):
            kept[name] += choose_calibration(scores, np.zeros(3), y, groups)[1]["chosen"] == "fitted"
    assert kept["rows"] >= 18 and kept["customers"] <= 8


def test_one_customer_leaves_nothing_to_score_a_fit_on():
    scores, y = drawn(30)
    record = choose_calibration(scores * 3, np.zeros(3), y, ["a"] * 30)[1]
    assert record["chosen"] in ("raw", "null") and set(record["dev_log_loss_cv"]) == {"raw", "null"}
    json.dumps(record, allow_nan=False)


def test_the_file_says_what_was_chosen_and_for_which_class_mix(tmp_path, task):
    scores, y = drawn(300)
    bias = np.array([0.0, 0.5, 0.0])
    plain, record = fit_and_save(tmp_path, task, scores * 3, np.zeros(3), y, np.arange(300), (0.3, 0.3, 0.4))
    fit, record = fit_and_save(
        tmp_path, task, scores * 3, np.zeros(3), y, np.arange(300), (0.3, 0.3, 0.4), (0.2, 0.5, 0.3), bias
    )
    d = json.loads((tmp_path / "calibration.json").read_text())
    assert d["chosen"] == record["chosen"] == "fitted" and d["dev_rows"] == 300
    assert set(d["dev_log_loss"]) == set(d["dev_log_loss_cv"]) == {"raw", "null", "fitted"}
    assert list(d["class_shares"].values()) == [0.3, 0.3, 0.4] and d["natural_shares"]["Standard"] == 0.5
    assert d["label_bias"] == {"Good": 0.0, "Standard": 0.5, "Bad": 0.0}
    assert np.array(fit.b) - plain.b == pytest.approx(bias) and Calibration.load(tmp_path, task) == fit
    assert fit(scores, np.zeros(3)) == pytest.approx(plain(scores + bias, np.zeros(3)))
    assert with_bias(Calibration(), bias).b == tuple(bias)


def test_weights_and_shares_by_hand():
    y = np.array([0, 0, 0, 1])
    assert class_shares(y, 3) == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    weights = class_weights(y, (0.5, 0.5, 0.0))
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert class_weights(y, (0.25, 0.25, 0.5)) == pytest.approx(weights)  # of the classes that occur


def test_natural_shares_hold_for_the_files_of_their_split(tmp_path, task):
    data = tmp_path / "creditmix_kd.jsonl"
    data.write_text("{}\n")
    assert natural_shares(split_record(data, file_sha256(data), task), task) == ()
    split = {"natural_shares": {"Bad": 0.2, "Good": 0.3, "Standard": 0.5}, "files": {data.name: file_sha256(data)}}
    (tmp_path / "creditmix_split.json").write_text(json.dumps(split))
    assert natural_shares(split_record(data, file_sha256(data), task), task) == pytest.approx((0.3, 0.5, 0.2))
    data.write_text("{}\n{}\n")  # other rows, of which the split file does not speak
    assert natural_shares(split_record(data, file_sha256(data), task), task) == ()
