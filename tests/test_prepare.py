"""creditmix_prepare.py: the split, the CSV's dirt, the files written, the synthetic data, bad input."""

import gzip
import json
import runpy
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest

import creditmix_prepare as prepare
from common import Task, holdout
from distill.files import ROOT, UserError, file_sha256
from distill.tasks.boosting import GradientBoosting, check_file, out_of_fold
from distill.tasks.creditmix import SIX, parse_fields
from distill.tasks.creditmix_twin import SLICES, shares, slice_means, synthesize, with_tails, write_profile
from distill.tasks.label_rows import balance, read_label_rows

TASK = Task.load(prepare.TASK)
SHIPPED = ROOT / "data" / "creditmix_dataset.json"
TEXT = (
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
)
MONTH = {
    "ID": "0x1",
    "Customer_ID": "CUS_1",
    "Month": "January",
    "Name": "A. Nonymous",
    "Age": "23",
    "SSN": "000-00-0000",
    "Occupation": "Scientist",
    "Annual_Income": "19114.12",
    "Monthly_Inhand_Salary": "1824.8433",
    "Num_Bank_Accounts": "3",
    "Num_Credit_Card": "4",
    "Interest_Rate": "3",
    "Num_of_Loan": "4",
    "Type_of_Loan": "Auto Loan",
    "Delay_from_due_date": "3",
    "Num_of_Delayed_Payment": "7",
    "Changed_Credit_Limit": "11.27",
    "Num_Credit_Inquiries": "4.0",
    "Credit_Mix": "Good",
    "Outstanding_Debt": "809.98",
    "Credit_Utilization_Ratio": "35.030402",
    "Credit_History_Age": "22 Years and 1 Months",
    "Payment_of_Min_Amount": "No",
    "Total_EMI_per_month": "49.574949",
    "Amount_invested_monthly": "80.415295",
    "Payment_Behaviour": "Low_spent_Small_value_payments",
    "Monthly_Balance": "312.49409",
    "Credit_Score": "Good",
}


SCRIPT = str(ROOT / "creditmix_prepare.py")


def run(*args):
    """The script as its users run it."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(message, *args): the script, in this process, ends with exit code 2 and one line holding message."""

    def check(message, *args):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(SCRIPT, run_name="__main__")
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error

    return check


def read(path, columns="six"):
    """CreditMix rows of a file, and the dropped ones."""
    return read_label_rows(path, TASK, columns)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_csv(path, *months):
    """A CSV of the public data's columns; each month is MONTH with what differs."""
    rows = [",".join(MONTH)] + [",".join({**MONTH, **m}.values()) for m in months]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def shipped():
    return read(SHIPPED)[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory, shipped):
    """Some of the shipped customers as a file of its own, and what the script made of it."""
    folder = tmp_path_factory.mktemp("small")
    src = folder / "rows.json"
    src.write_text(json.dumps(shipped[:1500]))
    done = run("--src", src, "--outdir", folder / "a")
    assert done.returncode == 0, done.stderr
    return src, folder / "a", done.stdout


# --- the split and the files


def test_no_customer_on_both_sides_of_the_shipped_file(shipped):
    train, held = holdout(shipped)
    assert len(train) + len(held) == len(shipped)
    assert not {r["group"] for r in train} & {r["group"] for r in held}
    assert min(Counter(r["answer"] for r in held).values()) >= 1500
    fewer = holdout(shipped, frac=0.1)[1]
    assert 0 < len(fewer) < len(held)
    assert {r["group"] for r in fewer} < {r["group"] for r in held}


def test_held_out_rows_are_in_no_file(small):
    src, out, _ = small
    train, held = holdout(read(src)[0])
    training = {TASK.prompt(r["question"]) for r in train}
    held = {TASK.prompt(r["question"]) for r in held}
    for stage, field in (("sft", "input"), ("kd", "input"), ("dpo", "prompt")):
        written = {r[field] for r in lines(out / f"creditmix_{stage}.jsonl")}
        assert written <= training
        assert not written & held


def test_files_are_balanced_and_agree_row_by_row(small):
    _, out, _ = small
    sft, kd, dpo = (lines(out / f"creditmix_{stage}.jsonl") for stage in ("sft", "kd", "dpo"))
    assert len(set(Counter(r["output"] for r in sft).values())) == 1
    assert [r["output"] for r in sft[:50]] != sorted(r["output"] for r in sft[:50])
    for s, k, d in zip(sft, kd, dpo, strict=True):
        assert s["input"] == k["input"] == d["prompt"]
        assert s["output"] == k["output"] == d["chosen"] != d["rejected"]
        assert s["group"] == k["group"] == d["group"]
        assert list(k["teacher_probs"]) == list(TASK.labels)
        assert sum(k["teacher_probs"].values()) == pytest.approx(1, abs=1e-5)
        assert k["teacher_output"] == max(k["teacher_probs"], key=k["teacher_probs"].get)


def test_balance_takes_a_row_of_every_customer_before_a_second_of_any():
    def rows(label, **months):
        return [
            {"group": g, "question": f"{label} {g} {i}", "answer": label} for g, n in months.items() for i in range(n)
        ]

    many, few = rows("Good", a=5, b=1, c=2), rows("Bad", d=2, e=2)
    chosen = balance("rows", many + few, ("Good", "Bad"), seed=1)
    customers = Counter(r["group"] for r in chosen)
    assert sum(customers[g] for g in "abc") == sum(customers[g] for g in "de") == 4
    assert customers["b"] == 1 and sorted((customers["a"], customers["c"])) == [1, 2]
    assert Counter(r["group"] for r in balance("rows", many + few, ("Good", "Bad"), 1, n=3))["a"] == 1


def test_rejected_labels_prefer_the_neighbouring_class(small):
    pairs = Counter((r["chosen"], r["rejected"]) for r in lines(small[1] / "creditmix_dpo.jsonl"))
    for end, other in (("Good", "Bad"), ("Bad", "Good")):
        near = pairs[end, "Standard"]
        assert 0.7 < near / (near + pairs[end, other]) < 0.9
    assert 0.4 < pairs["Standard", "Good"] / (pairs["Standard", "Good"] + pairs["Standard", "Bad"]) < 0.6


def test_split_file_says_what_was_done(small):
    src, out, printed = small
    split = json.loads((out / "creditmix_split.json").read_text())
    assert (split["seed"], split["columns"], split["source_sha256"]) == (42, "six", file_sha256(src))
    assert split["files"] == {
        f"creditmix_{s}.jsonl": file_sha256(out / f"creditmix_{s}.jsonl") for s in ("sft", "kd", "dpo")
    }
    counts = split["counts"]
    assert counts["read"]["rows"] == counts["training"]["rows"] + counts["held_out"]["rows"] == 1500
    assert counts["read"]["customers"] == counts["training"]["customers"] + counts["held_out"]["customers"]
    natural = {label: (counts["training"][label] + 1) / (counts["training"]["rows"] + 3) for label in TASK.labels}
    assert split["natural_shares"] == pytest.approx(natural)  # before balancing
    assert counts["written"]["rows"] == 3 * counts["written"]["Good"] == len(lines(out / "creditmix_sft.jsonl"))
    assert "1500 usable rows, 0 dropped" in printed and "held_out" in printed


def test_same_seed_same_bytes_another_seed_another_split(small, tmp_path):
    src, out, _ = small
    prepare.prepare(src, tmp_path / "same", TASK)
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    prepare.prepare(src, tmp_path / "other", TASK, seed=7)
    assert (out / "creditmix_sft.jsonl").read_bytes() != (tmp_path / "other" / "creditmix_sft.jsonl").read_bytes()


def test_rows_without_group_are_one_customer_by_income_and_debt(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [TEXT, TEXT.replace("35.03", "31.00"), TEXT.replace("809.98", "809.99"), "free text"]
    path.write_text("".join(json.dumps({"question": t, "answer": "Good"}) + "\n" for t in texts))
    groups = [r["group"] for r in read(path)[0]]
    assert groups[0] == groups[1] != groups[2]
    assert groups[3] == "free text"


def test_another_task_of_free_text_has_no_boosting_teacher(tmp_path):
    labels = ["red", "dark red", "blue"]
    task = {"name": "colours", "labels": labels, "template": "Which colour? {input}", "null_inputs": ["N/A"]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    rows = [{"question": f"thing number {i}", "answer": labels[i % 3]} for i in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = run("--src", tmp_path / "rows.json", "--outdir", tmp_path, "--task", tmp_path / "task.json")
    assert done.returncode == 0, done.stderr
    assert "no KD rows: gradient boosting teaches texts of fields" in done.stdout
    assert not (tmp_path / "colours_kd.jsonl").exists()
    assert lines(tmp_path / "colours_sft.jsonl")[0]["input"].startswith("Which colour? thing")


# --- the CSV and its dirt


def test_csv_text_is_exact(tmp_path):
    rows, dropped = read(write_csv(tmp_path / "a.csv", {}))
    assert rows == [{"question": TEXT, "answer": "Good", "group": "CUS_1"}]
    assert not dropped


def test_csv_may_be_gzipped(tmp_path):
    plain = write_csv(tmp_path / "a.csv", {})
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read(tmp_path / "a.csv.gz") == read(plain)


@pytest.mark.parametrize(
    "column, dirt",
    [
        ("Age", "-500"),
        ("Age", "8153"),
        ("Age", "7"),
        ("Age", "91"),  # possible, but not for this customer
        ("Age", "23_"),
        ("Annual_Income", "19114.12_"),
        ("Annual_Income", "23834698.0"),
        ("Annual_Income", "93200.00"),
        ("Annual_Income", ""),
        ("Outstanding_Debt", "_809.98"),
        ("Outstanding_Debt", ""),
        ("Occupation", "_______"),
        ("Occupation", ""),
        ("Credit_Mix", "_"),
    ],
)
def test_dirt_is_repaired_from_the_customers_other_months(tmp_path, column, dirt):
    stranger = {
        "Customer_ID": "CUS_2",
        "Age": "60",
        "Annual_Income": "90000",
        "Occupation": "Doctor",
        "Credit_Mix": "Bad",
    }
    rows, dropped = read(write_csv(tmp_path / "a.csv", stranger, {}, {column: dirt}, {}))
    assert not dropped
    assert rows[2] == rows[1] == rows[3] == {"question": TEXT, "answer": "Good", "group": "CUS_1"}


def test_a_column_that_the_source_has_cleaned_stands_for_the_raw_one(tmp_path):
    path = write_csv(tmp_path / "a.csv", {"Age": "-500", "Credit_Mix": "_"})
    head, month = path.read_text().splitlines()
    path.write_text(f"{head},Age_clean,Credit_Mix_clean\n{month},23,Good\n")
    (row,), dropped = read(path)
    assert (row["question"], row["answer"], dropped.total()) == (TEXT, "Good", 0)


def test_a_birthday_is_kept(tmp_path):
    rows, _ = read(write_csv(tmp_path / "a.csv", {}, {}, {"Age": "24"}))
    assert [r["question"][:9] for r in rows] == ["Age: 23.0", "Age: 23.0", "Age: 24.0"]


def test_what_cannot_be_repaired_is_dropped_and_counted(tmp_path):
    alone = [
        {"Age": "-500"},
        {"Annual_Income": "23834698.0"},
        {"Occupation": "_______"},
        {"Credit_Mix": "_"},
        {"Credit_Mix": "_", "Age": "8153"},
        {"Outstanding_Debt": "_"},
        {"Credit_Utilization_Ratio": "x"},
        {"Payment_Behaviour": "!@9#%8"},
    ]
    months = [{"Customer_ID": f"CUS_{i}", **m} for i, m in enumerate(alone)]
    # payment behaviour changes by the month, so other months do not tell it
    months += [{"Customer_ID": "CUS_9"}, {"Customer_ID": "CUS_9", "Payment_Behaviour": "!@9#%8"}, {"Customer_ID": ""}]
    rows, dropped = read(write_csv(tmp_path / "a.csv", *months))
    assert [r["group"] for r in rows] == ["CUS_9"]
    never = "in any month of the customer"
    assert dropped == {
        f"no Age {never}": 1,
        f"no Annual Income {never}": 1,
        f"no Occupation {never}": 1,
        f"no Credit Mix {never}": 2,
        f"no Outstanding Debt {never}": 1,
        "no Credit Utilization Ratio": 1,
        "no Payment Behaviour": 2,
        "no Customer ID": 1,
    }


def test_all_columns_follow_in_the_same_style(tmp_path):
    dirty = {"Num_Bank_Accounts": "1798", "Amount_invested_monthly": "__10000__", "Payment_of_Min_Amount": "NM"}
    rows, _ = read(write_csv(tmp_path / "a.csv", {}, {**dirty, "Credit_History_Age": "NA"}), "all")
    rest = (
        ", Monthly Inhand Salary: 1824.84, Num Bank Accounts: 3, Num Credit Card: 4, Interest Rate: 3, Num of Loan: 4, "
        "Delay from due date: 3, Num of Delayed Payment: 7, Changed Credit Limit: 11.27, Num Credit Inquiries: 4, "
        "Credit History Months: 265, Total EMI per month: 49.57, Amount invested monthly: 80.42, "
        "Monthly Balance: 312.49, Payment of Min Amount: "
    )
    assert [r["question"] for r in rows] == [TEXT + rest + "No", TEXT + rest + "N/A"]
    (row,), _ = read(write_csv(tmp_path / "b.csv", {"Monthly_Balance": "-333333333333333333333333333"}), "all")
    assert "Monthly Balance: N/A" in row["question"]


# --- gradient boosting


def test_parse_fields():
    assert parse_fields("Age: 23.0, Loans: Auto, Home: 1, Debt: -2.5") == {
        "Age": 23.0,
        "Loans": "Auto",
        "Home": 1.0,
        "Debt": -2.5,
    }
    assert np.isnan(parse_fields("Age: N/A")["Age"])
    with pytest.raises(UserError, match="Key: value"):
        parse_fields("no fields here")


def test_gradient_boosting_learns_numbers_and_words_and_takes_what_it_never_saw():
    texts = [f"Size: {i}, Kind: {'ab'[i % 2]}" for i in range(100)]
    answers = ["odd" if i % 2 else "large" if i > 50 else "small" for i in range(100)]
    model = GradientBoosting(["small", "large", "odd", "never"]).fit(texts, answers)
    probs = model.predict_proba(
        ["Size: 10.0, Kind: a", "Size: 90, Kind: a", "Size: 5, Kind: b", "Kind: c", "Size: big"]
    )
    assert probs.shape == (5, 4)
    assert probs[:3].argmax(1).tolist() == [0, 1, 2]
    assert probs.sum(1) == pytest.approx(np.ones(5))
    assert (probs[:, 3] == 0).all()


def test_out_of_fold_never_sees_the_customer():
    # neighbours have opposite labels: one's own rows tell the label, other customers' rows tell the wrong one
    rows = [{"question": f"Number: {i}", "answer": "ht"[i % 2], "group": str(i)} for i in range(20) for _ in range(15)]
    truth = [i % 2 for i in range(20) for _ in range(15)]
    assert (out_of_fold(rows, ["h", "t"]).argmax(1) == truth).mean() < 0.5
    model = GradientBoosting(["h", "t"]).fit([r["question"] for r in rows], [r["answer"] for r in rows])
    assert (model.predict_proba([r["question"] for r in rows]).argmax(1) == truth).all()
    with pytest.raises(UserError, match="2 customers of each class"):
        out_of_fold(rows[:30], ["h", "t"])


# --- the synthetic data


def test_synthesis_is_determined_by_the_seed(tmp_path):
    done = run("--synthesize", 40, "--seed", 1, "--outdir", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    files = [(tmp_path / "first" / "creditmix_dataset.json").read_bytes()]
    for seed in (1, 2):
        synthesize(40, seed, tmp_path / str(seed))
        files.append((tmp_path / str(seed) / "creditmix_dataset.json").read_bytes())
    assert files[0] == files[1] != files[2]
    assert len({r["group"] for r in json.loads(files[0])}) == 40


def test_a_synthetic_customer_has_one_label_income_debt_and_occupation(shipped):
    of = {}
    for r in shipped:
        f = parse_fields(r["question"])
        assert list(f) == SIX
        own = (r["answer"], f["Occupation"], f["Annual Income"], f["Outstanding Debt"])
        assert of.setdefault(r["group"], own) == own
    assert len(of) == 8800
    assert SHIPPED.stat().st_size < 6e6


def test_profile_of_the_twin_is_near_the_profile_it_was_drawn_from(tmp_path):
    write_profile(SHIPPED, tmp_path, TASK)
    made, drawn_from = (json.loads((f / "creditmix_profile.json").read_text()) for f in (tmp_path, ROOT / "data"))
    assert "synthetic" in made["note"]
    for label in TASK.labels:
        a, b = made["classes"][label], drawn_from["classes"][label]
        assert a["birthday"] == pytest.approx(b["birthday"], abs=0.05)
        assert a["months"] == pytest.approx(b["months"], abs=0.03)
        for mine, theirs in zip(a["payment_behaviour"], b["payment_behaviour"], strict=True):
            assert mine == pytest.approx(theirs, abs=0.06)
        for mine, theirs in zip(a["slice_means"], b["slice_means"], strict=True):
            assert mine["Outstanding Debt"][10] == pytest.approx(theirs["Outstanding Debt"][10], rel=0.15)
            assert mine["Credit Utilization Ratio"] == pytest.approx(theirs["Credit Utilization Ratio"], rel=0.06)
        gap = np.array(a["rank_correlation"]) - np.array(b["rank_correlation"])
        assert np.abs(gap).max() < 0.2  # the largest of 30 correlations, each over some 350 customers


def test_a_figure_of_the_profile_rests_on_ten_customers_or_there_is_no_profile():
    d = pd.DataFrame({"group": np.repeat(np.arange(200), 2), "Income": np.repeat(np.arange(200.0), 2), "Job": "x"})
    means = slice_means(d, "Income")  # ten customers in each slice of twenty rows
    assert len(means) == SLICES and means == [4.5 + 10 * i for i in range(SLICES)]
    assert shares(d, "Job") == {"x": 1.0}
    # one person's many rows can fill a slice, and a rare word can belong to one person
    d.loc[:29, ["group", "Job"]] = 0, "y"
    with pytest.raises(UserError, match="a slice of Income covers 1 customers; expected at least 10"):
        slice_means(d, "Income")
    with pytest.raises(UserError, match="Job y covers 1 customers"):
        shares(d, "Job")


def test_the_shipped_profile_holds_no_extreme_and_the_twin_has_tails(shipped):
    means = json.loads((ROOT / "data" / "creditmix_profile.json").read_text())["classes"]["Good"]["slice_means"]
    assert all(len(band[name]) == SLICES for band in means for name in band)
    curve = with_tails([10.0, 20.0, 40.0])
    assert curve == [5.0, 10.0, 20.0, 40.0, 50.0]  # half a slice beyond the first and the last mean
    income = [parse_fields(r["question"])["Annual Income"] for r in shipped if r["answer"] == "Good"]
    assert min(income) < min(band["Annual Income"][0] for band in means)
    assert max(income) > max(band["Annual Income"][-1] for band in means)


def test_check_prints_boosting_on_the_files_own_split(small, capsys):
    check_file(small[0], "six", 42, 0.35, TASK)
    *seeds, mean = capsys.readouterr().out.splitlines()
    assert len(seeds) == 3 and "mean of 3 seeds: accuracy 0." in mean


# --- bad input

GOOD = json.dumps({"question": TEXT, "answer": "Good"})
BAD_FILES = {
    "missing.json": (None, "missing.json: no such file"),
    "missing.csv": (None, "missing.csv: no such file"),
    "empty.json": ("", "empty.json: the file is empty"),
    "empty.csv": ("", "empty.csv: not a CSV file"),
    "broken.jsonl": (GOOD + '\n{"question": \n', "broken.jsonl:2: not JSON"),
    "field.jsonl": (GOOD + '\n{"answer": "Good"}\n', "field.jsonl:2: field 'question' is missing"),
    "type.jsonl": (
        '{"question": 3, "answer": "Good"}\n',
        "type.jsonl:1: field 'question': expected a valid string, got 3",
    ),
    "label.jsonl": (GOOD.replace("Good", "Great"), "field 'answer': 'Great' is no label; expected ('Good'"),
    "class.jsonl": (GOOD + "\n" + GOOD, "training side: class"),
    "column.csv": ("Customer_ID,Credit_Mix\nCUS_1,Good\n", "column.csv:1: column 'Age' is missing"),
    "rows.csv": (",".join(MONTH) + "\n", "rows.csv: no rows"),
    "ragged.csv": ("a,b\n1,2\n1,2,3\n", "ragged.csv: not a CSV file: "),
    "zip.csv.gz": ("not zipped", "zip.csv.gz: not a CSV file: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, refused, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    refused(message, "--src", tmp_path / name, "--outdir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_rows_in_a_csv(tmp_path, refused):
    src = write_csv(tmp_path / "a.csv", {}, {"Credit_Mix": "Great"})
    refused("a.csv:3: column 'Credit_Mix': expected Good, Standard, Bad or _, got 'Great'", "--src", src)
    src = write_csv(tmp_path / "b.csv", {"Payment_Behaviour": "!@9#%8"})
    refused("b.csv: no usable row; dropped: {'no Payment Behaviour': 1}", "--src", src)


def test_bad_flags(tmp_path, refused):
    refused("--columns all: expected the CSV", "--src", SHIPPED, "--columns", "all")
    refused("--val_frac 1.5: expected a share between 0 and 1", "--src", SHIPPED, "--val_frac", "1.5")
    refused("--synthesize 0: expected at least 1 customer", "--synthesize", "0", "--outdir", tmp_path)
    refused("no.json: no such file", "--src", SHIPPED, "--task", tmp_path / "no.json")


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = run("--src", tmp_path / "none.json")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'none.json'}: no such file\n")
