"""The evaluation's figures by hand, and evaluation and inference as a user runs them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from common import Task, holdout, row_hash
from distill.evaluate import (
    accuracy_and_macro_f1,
    act_above,
    bootstrap,
    bootstrap_mean,
    check_overlap,
    class_counts,
    compare,
    confusion,
    coverage_at_error,
    ece,
    interval,
    metrics,
    overlap_lines,
    overlap_record,
    precision_recall_f1,
    ratio,
    sign_flip_p,
    takes_over,
)
from distill.files import UserError, write_json
from distill.model.hub import check_models

LABELS = ("Good", "Good enough", "Standard", "Bad", "Very bad indeed", "Very good")  # one begins another
TASK6 = Task("grades", LABELS, "Grade it.\n\n{input}", ("N/A", ""))


# Figures by hand


def test_confusion_accuracy_and_f1_by_hand():
    y, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    assert confusion(y, predicted, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    counts = class_counts(y, predicted, 3).sum(0)
    assert counts.tolist() == [[1, 2, 2], [2, 3, 2], [0, 0, 1]]
    precision, recall, f1 = precision_recall_f1(counts)
    assert precision.tolist() == [0.5, pytest.approx(2 / 3), 0] and recall.tolist() == [0.5, 1, 0]
    assert f1.tolist() == [0.5, pytest.approx(0.8), 0]
    assert accuracy_and_macro_f1(counts).tolist() == pytest.approx([3 / 5, (0.5 + 0.8 + 0) / 3])


def test_ece_and_brier_by_hand(task):
    p = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.1, 0.6, 0.3]])
    y = np.array([0, 1, 1, 1])
    assert ece(p, y) == pytest.approx(0.5 * abs(0.5 - 0.8) + 0.5 * abs(1.0 - 0.6))
    found = metrics(np.log(p), y, np.arange(4), task)
    rows = [0.04 + 0.01 + 0.01, 0.64 + 0.81 + 0.01, 0.01 + 0.16 + 0.09, 0.01 + 0.16 + 0.09]
    assert found["brier"] == pytest.approx(np.mean(rows))
    assert found["log_loss"] == pytest.approx(-np.mean(np.log([0.8, 0.1, 0.6, 0.6])))


def test_weights_of_rows_count_like_copies_of_rows(task):
    rng = np.random.default_rng(0)
    scores, y, copies = rng.normal(size=(60, 3)), rng.integers(0, 3, 60), rng.integers(1, 4, 60)
    groups = np.arange(60) // 3
    weighted = metrics(scores, y, groups, task, copies.astype(float))
    copied = metrics(*(np.repeat(x, copies, axis=0) for x in (scores, y, groups)), task)

    def numbers(found):
        return [v for d in found.values() for v in np.ravel(list(d.values()) if isinstance(d, dict) else d)]

    for name in copied.keys() - {"per_class", "takes_over"}:
        assert numbers({name: weighted[name]}) == pytest.approx(numbers({name: copied[name]})), name
    for label in task.labels:
        assert weighted["per_class"][label] == pytest.approx(copied["per_class"][label])


def test_coverage_at_an_error_by_hand():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert coverage_at_error(p, np.array([0, 0, 0, 1]), 0.05) == 0.75
    assert coverage_at_error(p, np.array([0, 0, 0, 1]), 0.25) == 1.0  # one of four
    assert coverage_at_error(p, np.array([1, 0, 0, 0]), 0.05) == 0.0  # the surest is wrong
    assert coverage_at_error(p, np.array([0, 1, 0, 0]), 0.25) == 1.0  # and later rows make up for one
    assert coverage_at_error(p, np.array([0, 0, 0, 1]), 0.05, np.array([1.0, 1, 1, 5])) == 3 / 8
    assert coverage_at_error(p[[0, 0, 0, 0]], np.array([0, 0, 0, 1]), 0.05) == 0.0  # equally sure: all or none


def test_acting_above_a_probability_by_hand():
    p = np.array([[0.9, 0.1], [0.65, 0.35], [0.45, 0.55], [0.2, 0.8]])
    table = act_above(p, np.array([0, 1, 1, 1]), ("a", "b"))
    at = {entry["p"]: entry for entry in table}
    assert (at[0.5]["coverage"], at[0.5]["error"]) == (1.0, 0.25)
    assert (at[0.8]["coverage"], at[0.8]["error"]) == (0.5, 0.0)
    assert at[0.6]["per_class"]["a"] == {"share": 0.5, "precision": 0.5, "recall": 1.0}
    assert at[0.7]["per_class"]["b"] == {"share": 0.25, "precision": 1.0, "recall": pytest.approx(1 / 3)}
    assert (at[0.95]["coverage"], at[0.95]["error"]) == (0.0, None)
    assert at[0.95]["per_class"]["a"] == {"share": 0.0, "precision": None, "recall": 0.0}
    weighted = act_above(p, np.array([0, 1, 1, 1]), ("a", "b"), np.array([1.0, 3, 1, 1]))
    assert weighted[0]["error"] == 0.5 and weighted[0]["per_class"]["a"]["precision"] == 0.25


def test_mcnemar_by_hand():
    a = np.array([1, 1, 1, 1, 1, 1, 0, 1], dtype=bool)
    b = np.array([0, 0, 0, 0, 0, 0, 1, 1], dtype=bool)
    found = compare(a, b, np.arange(8))
    assert (found["only_a_right"], found["only_b_right"], found["groups"]) == (6, 1, 7)
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7)  # two-sided binomial of 1 or fewer in 7
    assert found["permutation_p"] == pytest.approx(found["p"])  # one row per customer: the same test
    same = compare(a, a, np.arange(8))
    assert same["p"] == same["permutation_p"] == 1.0


def test_sign_flips_by_hand():
    assert sign_flip_p(np.array([3, 1, 1])) == 2 / 8  # only all signs equal reach 5
    assert sign_flip_p(np.array([2, -1])) == 1.0  # every sum is at least 1 away from 0
    assert sign_flip_p(np.array([2, 2, -1])) == 4 / 8  # of 5, 3, 1 and 1, with either sign, two reach 3
    assert sign_flip_p(np.array([0, 0])) == 1.0
    rng = np.random.default_rng(0)
    sizes = rng.integers(-8, 9, 60)
    flips = np.abs((rng.choice([-1, 1], (100_000, 60)) * sizes).sum(1)) >= abs(sizes.sum())
    assert sign_flip_p(sizes) == pytest.approx(flips.mean(), abs=0.01)


def test_rows_of_a_customer_that_agree_are_one_observation():
    """30 customers of 8 rows: one model is right on all rows of 20 of them, the other on all rows of 10."""
    a = np.repeat(np.arange(30) < 20, 8)
    found = compare(a, ~a, np.repeat(np.arange(30), 8))
    assert found["p"] < 1e-6  # McNemar: 160 against 80 rows
    assert found["permutation_p"] == pytest.approx(0.0987, abs=1e-4)  # two-sided binomial of 20 in 30
    assert found["groups"] == 30


def test_permutation_p_is_uniform_where_rows_are_correlated_and_mcnemar_is_not():
    rng = np.random.default_rng(0)
    groups, small = np.repeat(np.arange(50), 6), {"p": 0, "permutation_p": 0}
    for _ in range(200):  # two models that are equally good, each right on all rows of a customer or on none
        a, b = (np.repeat(rng.random(50) < 0.6, 6) for _ in range(2))
        for name in small:
            small[name] += compare(a, b, groups)[name] < 0.05
    assert small["permutation_p"] <= 18 and small["p"] > 60


def test_bootstrap_resamples_customers_not_rows(task):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400)
    right = np.repeat(rng.random(100) < 0.7, 4)  # four rows per customer, all right or all wrong
    customers, rows = (bootstrap_mean(right, np.arange(400) // n).std() for n in (4, 1))
    assert customers == pytest.approx(np.sqrt(0.7 * 0.3 / 100), rel=0.15) and customers > 1.7 * rows
    scores = 5 * np.eye(3)[np.where(right, y, (y + 1) % 3)]  # the intervals of the report are those
    low, high = metrics(scores, y, np.arange(400) // 4, task)["accuracy_ci95"]
    assert high - low == pytest.approx(2 * 1.96 * customers, rel=0.1)


def test_bootstrap_keeps_groups_whole():
    rows = np.eye(4)  # each row's sum is then how often it was drawn
    drawn = bootstrap(lambda sums: sums, rows, ["a", "b", "a", "c"], draws=50)
    assert drawn.shape == (50, 4) and (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all() and np.ptp(drawn[:, 1]) > 0
    again = bootstrap(lambda sums: sums, rows, ["a", "b", "a", "c"], draws=50)
    assert (again == drawn).all()


def test_interval_of_a_mean_by_hand():
    assert interval(bootstrap_mean(np.ones(7), range(7))) == [1.0, 1.0]
    low, high = interval(bootstrap_mean([0.0, 1.0] * 50, range(100)))
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.02)  # 0.5 -+ 1.96 * 0.05
    empty = bootstrap(ratio, np.array([[1, 1], [0, 0]]), ["a", "b"])  # a resample of b alone has no denominator
    assert np.isnan(empty).any() and interval(empty) == [1.0, 1.0]


def test_overlap_is_a_number_or_unknown_and_none_for_a_base(tmp_path, capsys):
    seen, silent = tmp_path / "seen", tmp_path / "silent"
    for folder in (seen, silent):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    (seen / "train_rows.txt").write_text(row_hash("plan: b") + "\n")
    rows = [["a", "plan: a"], ["b", "plan: b"]]  # a problem is asked for in two ways
    with pytest.raises(UserError, match="seen: trained on 1 of the 2 evaluation rows; expected none"):
        check_overlap(seen, rows, allowed=False)
    overlap = {name: check_overlap(name, rows, allowed=True) for name in ("smollm2-135m", seen, silent)}
    assert list(overlap.values()) == [0, 1, None]
    unknown = f"{silent}: no train_rows.txt, so its overlap with the evaluation rows is unknown"
    assert capsys.readouterr().err == unknown + "\n"
    assert overlap_record(overlap) == {"overlap": 1, "overlap_unknown": [str(silent)]}
    assert overlap_lines(overlap_record(overlap))[0] == unknown
    assert overlap_lines(overlap_record(overlap))[1].startswith("WARNING: 1 evaluation rows were trained on")
    assert overlap_lines(overlap_record({"smollm2-135m": 0})) == []


def test_dark_cells_of_the_confusion_picture_have_white_figures():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from distill.report import draw_confusion

    figure, axis = plt.subplots()
    draw_confusion(axis, np.array([[9, 1], [6, 4]]), ("a", "b"))
    assert [t.get_color() for t in axis.texts] == ["white", "black", "white", "black"]
    plt.close(figure)


def test_a_class_that_takes_over_is_named():
    assert takes_over(np.array([[10, 0], [9, 1]]), 0) and not takes_over(np.array([[10, 0], [3, 7]]), 0)


# The scripts


def features(i, label):
    return (
        f"Age: {20 + i % 40}.0, Annual Income: {1000 + i}.00, Outstanding Debt: {LABELS.index(label)}0{i % 100:02}.00"
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """240 rows of 120 customers with six labels, and the task file."""
    folder = tmp_path_factory.mktemp("raw")
    rows = [(i, LABELS[i // 2 % 6]) for i in range(240)]
    write_json(
        folder / "rows.json",
        [{"question": features(i, label), "answer": label, "group": str(i // 2)} for i, label in rows],
    )
    TASK6.save(folder / "task.json")
    return folder


def test_another_label_task_needs_no_code(run, tiny, raw, tmp_path):
    """Six labels, some of several tokens, one the beginning of another: rows and a task file are enough."""
    task = ("--task", raw / "task.json")
    done = run("creditmix_prepare.py", "--src", raw / "rows.json", "--outdir", tmp_path, *task)
    assert done.returncode == 0, done.stderr[-1500:]
    TASK6.save(tmp_path / "grades_task.json")
    for route in ("sft", "kd"):  # KD covers labels of several tokens in the distribution loss
        flags = ["--student", tiny, "--save_dir", tmp_path / route, "--max_steps", 2, "--batch_size", 8]
        done = run(f"{route}_train.py", "--data", tmp_path / f"grades_{route}.jsonl", *flags, "--dev_rows", 8)
        assert done.returncode == 0, done.stderr[-1500:]
    out = tmp_path / "report"
    flags = ["--data", raw / "rows.json", "--val_per_class", 5, *task, "--out", out]
    done = run("eval_creditmix.py", "--model_dir", tiny, tmp_path / "sft", tmp_path / "kd", *flags)
    assert done.returncode == 0, done.stderr[-1500:]
    report = json.loads((out / "report.json").read_text())
    assert report["n"] == 30 and report["overlap"] == 0 and len(report["models"]) == 3
    split = json.loads((tmp_path / "grades_split.json").read_text())
    calibration = json.loads((tmp_path / "kd" / "calibration.json").read_text())
    assert calibration["natural_shares"] == report["natural_shares"] == split["natural_shares"]
    assert calibration["chosen"] in ("raw", "null", "fitted") and set(calibration["class_shares"]) == set(LABELS)
    assert report["class_prior"] is None and report["overlap_unknown"] == []
    for entry in report["models"]:
        assert set(entry["natural_mix"]) == {"as_served", "natural"} and len(entry["act_above"]) == 6
    assert 0 < report["mcnemar"][0]["permutation_p"] <= 1 and "by sign flips over" in (out / "report.txt").read_text()
    assert {"majority", "gradient_boosting"} == set(report["references"]) == set(report["natural_references"])
    for view in (report["models"][1]["raw"], report["models"][1]["null"], report["models"][1]["fitted"]):
        wanted = {"accuracy", "macro_f1", "accuracy_ci95", "macro_f1_ci95", "per_class", "confusion", "log_loss"}
        assert wanted | {"brier", "ece"} <= set(view) and set(view["per_class"]) == set(LABELS)
    assert report["models"][0]["fitted"] is None and len(report["mcnemar"]) == 3
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and all(line[str(tmp_path / "sft")]["prediction"] in LABELS for line in lines)
    assert {p.suffix for p in out.iterdir()} >= {".json", ".jsonl", ".png", ".txt"}
    again = run("eval_creditmix.py", "--model_dir", tiny, tmp_path / "sft", tmp_path / "kd", *flags)
    assert "scoring" not in again.stderr and again.returncode == 0  # scores kept: a stopped evaluation goes on


def test_a_model_that_saw_the_rows_is_refused(run, tiny_adapter, raw, tmp_path):
    adapter = tmp_path / "seen"
    shutil.copytree(tiny_adapter("sft"), adapter)
    TASK6.save(adapter / "task.json")
    (adapter / "calibration.json").unlink()
    rows = json.loads((raw / "rows.json").read_text())
    seen = [row_hash(TASK6.prompt(r["question"])) for r in holdout(rows)[1]]
    (adapter / "train_rows.txt").write_text("\n".join(seen))
    flags = ["--model_dir", adapter, "--data", raw / "rows.json", "--val_per_class", 3, "--out", tmp_path / "report"]
    done = run("eval_creditmix.py", *flags)
    assert done.returncode == 2 and "trained on 18 of the 18 evaluation rows; expected none" in done.stderr
    done = run("eval_creditmix.py", *flags, "--allow_overlap", "--fit_calibration", "--label_bias", "Bad=0.3")
    assert done.returncode == 0 and "WARNING: 18 evaluation rows were trained on" in done.stdout, done.stderr[-1500:]
    calibration = json.loads((adapter / "calibration.json").read_text())
    assert calibration["dev_rows"] > 0 and calibration["label_bias"]["Bad"] == 0.3
    (adapter / "train_rows.txt").write_text("\n".join(row_hash(TASK6.prompt(r["question"])) for r in rows))
    done = run("eval_creditmix.py", *flags, "--allow_overlap", "--fit_calibration")
    assert done.returncode == 2 and "no development row that it was not trained on" in done.stderr


def test_a_text_task_has_tfidf_and_the_untrained_base_as_references(run, tiny, tiny_adapter, tmp_path):
    task = Task("colours", ("red", "blue"), "Which colour? {input}", ("N/A", ""))
    adapter = tmp_path / "colours"
    shutil.copytree(tiny_adapter("sft"), adapter)
    task.save(adapter / "task.json")
    (adapter / "calibration.json").unlink()
    rows = [{"question": f"a {('rose', 'sky')[i % 2]} number {i}", "answer": task.labels[i % 2]} for i in range(90)]
    write_json(tmp_path / "rows.json", rows)
    flags = ["--model_dir", adapter, "--data", tmp_path / "rows.json", "--out", tmp_path / "report"]
    done = run("eval_creditmix.py", *flags, "--class_prior", '{"red": 9, "blue": 1}')
    assert done.returncode == 0 and f"{tiny}: evaluated as well, the untrained reference" in done.stdout, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["references"]["gradient_boosting"] is None
    assert report["references"]["tfidf_logistic_regression"]["accuracy"] == 1.0
    assert [e["model_dir"] for e in report["models"]] == [str(adapter), str(tiny)]
    assert report["models"][1]["null"]["accuracy"] >= 0 and report["models"][1]["fitted"] is None
    assert report["class_prior"] == '{"red": 9, "blue": 1}'
    assert report["models"][0]["calibration"]["class_shares"] == [0.9, 0.1]
    line = json.loads((tmp_path / "report" / "predictions.jsonl").read_text().splitlines()[0])[str(adapter)]
    prior = report["models"][0]["prior"]
    by_hand = [raw - p + np.log(share / 0.5) for raw, p, share in zip(line["raw"], prior, (0.9, 0.1), strict=True)]
    assert line["scores"] == pytest.approx(by_hand)


def test_a_bad_model_is_reported_before_another_is_scored(run, tiny, tiny_adapter, raw, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_adapter("sft"), broken)
    TASK6.save(broken / "task.json")
    path = broken / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k: w * ("lora_A" in k) for k, w in weights.items()}, path)
    flags = ["--data", raw / "rows.json", "--task", raw / "task.json", "--out", tmp_path / "report"]
    done = run("eval_creditmix.py", "--model_dir", tiny, broken, *flags)
    assert done.returncode == 2 and not (tmp_path / "report").exists()
    assert f"error: {broken}: 14 matrices are zero, for example " in done.stderr, done.stderr[-1500:]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged: "):
        check_models([tiny, broken])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        check_models([tiny, tiny_adapter("sft"), tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_per_class", "500"], "held-out rows"),
        (["--label_bias", "Great=1"], "--label_bias Great=1: expected LABEL=NUMBER"),
        (["--class_prior", "none.json"], "none.json: no such file"),
        (["--task", "none.json"], "none.json: no such file"),
        (["--data", "none.json"], "none.json: no such file"),
    ],
)
def test_bad_input_of_the_evaluation(run, tiny, raw, flags, message):
    base = {"--model_dir": tiny, "--data": raw / "rows.json", "--task": raw / "task.json", "--out": raw / "x"}
    base |= dict(zip(flags[::2], flags[1::2], strict=True))
    done = run("eval_creditmix.py", *[x for pair in base.items() for x in pair])
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_infer_a_file_and_one_row_agree(run, tiny_adapter, jsonl, tmp_path):
    rows = [{"question": f"Age: {i}.0, Occupation: Writer", "id": i} for i in range(40)]
    flags = [
        "--model_dir",
        tiny_adapter("kd"),
        "--input",
        jsonl("rows.jsonl", rows),
        "--output",
        tmp_path / "out.jsonl",
    ]
    done = run("infer_creditmix.py", *flags)
    assert done.returncode == 0 and "40 rows in" in done.stdout, done.stderr[-1500:]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in found] == list(range(40))
    one = run("infer_creditmix.py", "--model_dir", tiny_adapter("kd"), "--features", rows[7]["question"])
    one = json.loads(one.stdout)
    fields = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]
    assert list(one) == fields
    for label, score in one["scores"].items():
        assert score == pytest.approx(found[7]["scores"][label], abs=1e-4)
        by_hand = (one["raw_scores"][label] + {"Good": 0.1, "Standard": 0.0, "Bad": -0.1}[label]) / 0.8
        assert score == pytest.approx(by_hand)
    assert sum(one["probabilities"].values()) == pytest.approx(1)
    top = sorted(one["scores"].values())
    assert one["top2_margin"] == pytest.approx(top[-1] - top[-2])
    shares = {"Good": 0.3, "Standard": 0.5, "Bad": 0.2}
    flags = ["--features", rows[7]["question"], "--class_prior", json.dumps(shares)]
    other = json.loads(run("infer_creditmix.py", "--model_dir", tiny_adapter("kd"), *flags).stdout)
    by_hand = {label: p * shares[label] for label, p in one["probabilities"].items()}
    assert other["raw_scores"] == pytest.approx(one["raw_scores"], abs=1e-4)
    total = sum(by_hand.values())
    assert other["probabilities"] == pytest.approx({k: v / total for k, v in by_hand.items()}, abs=1e-4)


def test_infer_reads_standard_input_in_any_folder_and_keeps_the_fields_of_a_row(tiny, tmp_path):
    rows = [{"id": f"row {i}", "question": f"Age: {i}.0", "seen": {"by": [i]}} for i in range(3)]
    command = [sys.executable, ROOT / "infer_creditmix.py", "--model_dir", tiny, "--input", "-", "--output", "-"]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows, done.stderr[-1500:]
    assert all(row["prediction"] in ("Good", "Standard", "Bad") for row in found)
    command[4:] = ["--features", b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "expected UTF-8" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "  "], "--features: the text is empty"),
        ([], "expected either --features TEXT, or --input FILE with --output FILE"),
        (["--features", "x", "--class_prior", "natural"], "calibration.json does not record it; expected balanced"),
        (["--features", "x " * 50_000], "tokens; expected at most"),
        (["--input", "none.jsonl", "--output", "o.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_bad_input_of_the_inference(run, tiny_adapter, flags, message):
    done = run("infer_creditmix.py", "--model_dir", tiny_adapter("kd"), *flags)
    assert done.returncode == 2 and message in done.stderr.split("\n")[-2], done.stderr[-1500:]


@pytest.mark.parametrize("route", ["sft", "kd", "dpo"])
def test_a_shipped_adapter_beats_the_base_on_held_out_twin_rows(task, route):
    """36 held-out rows through the real student: enough to see 0.66 against 0.34."""
    from common import Calibration, LabelScorer, holdout, label_classes, load_model
    from distill.files import ROOT
    from distill.tasks.label_rows import read_label_rows, rows_per_class

    rows = read_label_rows(ROOT / "data" / "creditmix_dataset.json", task)[0]
    held = rows_per_class(holdout(rows)[1], task, 12, 42)
    y = label_classes("held out", held, "answer", task)
    prompts = [task.prompt(r["question"]) for r in held]

    def right(name):
        scorer = LabelScorer(*load_model(name, "fp32"), task.labels, task.null_prompts())
        scores = Calibration.load(name, task)(scorer.score(prompts), scorer.prior(task))
        return int((scores.argmax(1) == y).sum())

    folder = ROOT / "runs" / f"smollm2_{route}"
    seen = set((folder / "train_rows.txt").read_text().split())
    assert not seen & {row_hash(p) for p in prompts}
    assert right(folder) >= right("smollm2-135m") + 4
