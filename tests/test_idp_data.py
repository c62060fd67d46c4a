"""idp_prepare.py and eval_idp.py: the corpus, the split, the rejected answers, and the metrics by hand."""

import gzip
import json
import random
import re

import pytest
from conftest import ROOT

from common import dev_split, row_hash
from distill.evaluate import precision_recall_f1
from distill.files import UserError, read_json
from distill.tasks.augment import shown_values, swap_values
from distill.tasks.idp_corpus import mistakes, read_answers, read_corpus, without_held_out
from distill.tasks.idp_documents import idp_prompt
from distill.tasks.idp_schema import schema_sha256, validator
from distill.tasks.idp_score import canonical, edit_similarity, field_counts, free_value, regex_receipt
from distill.tasks.idp_synthetic import synthesize
from eval_idp import summarise

SCHEMA = ROOT / "data" / "idp_schema.json"
SROIE = ROOT / "data" / "sroie_schema.json"
RECEIPT = """YONG ENTERPRISE
(JM0517726)
NO 12 JALAN DEDAP
81100 JOHOR BAHRU
TEL 07-3523888
DATE 25/12/2018
SUB TOTAL 70.00
TOTAL : 80.90
CASH : 100.00"""
GOLD = {
    "company": "YONG ENTERPRISE",
    "date": "25/12/2018",
    "address": "NO 12 JALAN DEDAP 81100 JOHOR BAHRU",
    "total": "80.90",
}


def test_the_shipped_corpus_is_what_the_seed_generates():
    rows = [json.loads(line) for line in (ROOT / "data" / "idp_corpus.jsonl").read_text("utf-8").splitlines()]
    assert rows == synthesize(600, 42)
    judge = validator(read_json(SCHEMA))
    assert all(judge.is_valid(r["gold"]) for r in rows)
    assert synthesize(20, 1) != synthesize(20, 2)


def test_what_the_generated_gold_states_is_in_the_document():
    """Amounts always; a text field in a bad scan is misread by a few letters, in about one document of eight."""
    rows, misread = synthesize(200, 7), set()
    for i, row in enumerate(rows):
        text = " ".join(row["document"].split())
        for field in filter(None, [row["gold"]["company"], *(item["description"] for item in row["gold"]["items"])]):
            if field not in text:
                misread.add(i)
                near = [text[at : at + len(field)] for at in range(len(text))]
                assert max(edit_similarity(n, field) for n in near if n[:1] == field[:1] or n[-1] == field[-1]) > 0.6
        for key in ("subtotal", "tax", "total"):
            amount = row["gold"][key]
            digits = f"{amount:,.2f}" if amount is not None else ""
            assert digits in text or digits.translate(str.maketrans(",.", ".,")) in text
    assert 10 < len(misread) < 40


def test_prepare_splits_by_group_and_checks_itself(run, parsed, tmp_path):
    corpus = tmp_path / "a corpus.jsonl"
    done = run("idp_prepare.py", "--synthesize", 80, "--src", corpus, "--schema", SCHEMA, "--outdir", tmp_path)
    assert done.returncode == 0, done.stderr
    train, evaluate = (parsed(line.removeprefix("next:")) for line in done.stdout.splitlines()[-2:])
    assert train.data == tmp_path / "idp_sft.jsonl" and str(train.save_dir) == evaluate.model_dir[0]
    assert (evaluate.data, evaluate.schema, evaluate.val_frac) == (corpus, SCHEMA, 0.33)
    sft, kd, dpo = ([json.loads(x) for x in (tmp_path / f"idp_{n}.jsonl").open()] for n in ("sft", "kd", "dpo"))
    schema = read_json(SCHEMA)
    judge, rows = validator(schema), read_corpus(corpus, schema, "company")
    by_prompt = {idp_prompt(schema, r["document"]): r for r in rows}
    trained = {by_prompt[r["input"]]["group"] for r in sft}
    held = [r for r in rows if idp_prompt(schema, r["document"]) not in {x["input"] for x in sft}]
    assert held and not trained & {r["group"] for r in held}
    for r in sft:
        assert json.loads(r["output"]) == by_prompt[r["input"]]["gold"] and r["schema_sha256"] == schema_sha256(schema)
        assert (
            list(json.loads(r["output"])) == list(schema["properties"]) and ": " not in r["output"].split('"items"')[0]
        )
    assert [r["teacher_output"] for r in kd] == [r["output"] for r in sft]
    for r in dpo:
        rejected = json.loads(r["rejected"])
        assert judge.is_valid(rejected) and rejected != json.loads(r["chosen"]) and r["prompt"] in by_prompt


def test_mistakes_are_the_plausible_ones():
    gold = {"date": "2024-03-05", "items": [{"n": 1}, {"n": 2}], "total": 9.5, "tax": 0.5, "name": "A B C"}
    made = mistakes(gold, "TOTAL 9.50 CASH 10.00")
    assert ("swapped numbers", {**gold, "total": 0.5, "tax": 9.5}) in made
    assert ("swapped day and month", {**gold, "date": "2024-05-03"}) in made
    assert ("missing item", {**gold, "items": [{"n": 2}]}) in made
    assert ("other number", {**gold, "total": 10.0}) in made
    assert ("text cut short", {**gold, "name": "A B"}) in made
    assert ("date format", {"d": "2018/12/25"}) in mistakes({"d": "25/12/2018"}, "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": "x", "gold": {**GOLD, "total": 5}}, r"row 1: gold \$.total: 5 is not of type"),
        ({"document": "x", "gold": {"company": "A"}}, r"row 1: gold \$: 'date' is a required property"),
        ({"document": " ", "gold": GOLD}, "field 'document': expected text that is not blank, got ' '"),
        ({"document": "x"}, "field 'gold' is missing"),
    ],
)
def test_a_bad_corpus_row_is_named(jsonl, row, message):
    with pytest.raises(UserError, match=message):
        read_corpus(jsonl("c.jsonl", [row]), read_json(SROIE), "company")


def test_group_is_the_companys_spelling_or_the_document(jsonl):
    rows = [{"document": "a", "gold": {**GOLD, "company": c}} for c in ("Acme, Ltd.", "ACME LTD", None)]
    rows.append({"document": "b", "gold": {**GOLD, "company": None}, "group": "own"})
    groups = [r["group"] for r in read_corpus(jsonl("c.jsonl", rows), read_json(SROIE), "company")]
    assert groups[0] == groups[1] and groups[2] not in (None, groups[0]) and groups[3] == "own"


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("RM 1,234.50", 1234.5, True),
        ("9.00", "9.0", True),
        ("25/12/2018", "2018-12-25", True),
        ("25 DEC 18", "25.12.2018", True),
        ("25/12/2018", "12/25/2018", False),
        ("NO.2, JALAN 3", "no 2 jalan 3", True),
        ("ACME", "ACNE", False),
        ("80", "80.00", True),
        ("120345", "12345", False),
        ("0012", "12", False),
        ("12032018", "2018-03-12", True),
        ("", None, True),
        (True, 1, False),
        ("31/02/2018", "31-02-2018", True),  # no date: compared as text
    ],
)
def test_canonical(a, b, equal):
    assert (canonical(a) == canonical(b)) is equal


def test_edit_similarity_by_hand():
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "") == 1 and edit_similarity("abc", "") == 0 and edit_similarity("ab", "ab") == 1


def test_field_counts_and_f1_by_hand():
    gold = {"name": "A", "total": 5.0, "items": [{"d": "x"}, {"d": "y"}, {"d": "y"}]}
    predicted = {"name": "B", "total": "5.00", "items": [{"d": "y"}, {"d": "z"}], "date": "2020-01-01"}
    counts = field_counts(predicted, gold)
    assert counts == {"name": [0, 1, 1], "total": [1, 1, 1], "items[].d": [1, 2, 3], "date": [0, 1, 0]}
    precision, recall, f1 = precision_recall_f1([[1, 2, 3], [0, 0, 0], [2, 2, 2]])
    assert precision.tolist() == [0.5, 0, 1] and recall.tolist() == [pytest.approx(1 / 3), 0, 1]
    assert f1.tolist() == [pytest.approx(0.4), 0, 1]


def test_summary_by_hand():
    gold = [{"a": "x", "b": 1.0}, {"a": "y", "b": 2.0}]
    results = [{"value": {"a": "x", "b": 1.0}, "valid": True}, {"value": None, "valid": False}]
    s = summarise(results, gold, ["g", "h"])
    assert s["valid"]["value"] == s["exact_match"]["value"] == 0.5
    assert s["fields"]["a"]["precision"] == 1 and s["fields"]["a"]["recall"] == 0.5
    assert s["macro_f1"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert s["fields"]["a"]["edit_similarity"] == 0.5
    assert s["valid"]["ci95"] == [0.0, 1.0]
    # of two groups a sample has 0, 1 or 2 times the right one: a quarter of the samples have none
    intervals = {k: s["fields"]["a"][f"{k}_ci95"] for k in ("precision", "recall", "f1", "edit_similarity")}
    assert all(v == [0.0, 1.0] for v in intervals.values())


def test_intervals_of_a_field_are_over_groups():
    """Three documents of one company are one observation, and a field that is always right has no spread."""
    gold = [{"a": "x", "b": "left"}] * 3 + [{"a": "x", "b": None}]
    results = [{"value": {"a": "x", "b": "lift"}, "valid": True}] * 3 + [{"value": {"a": "x"}, "valid": True}]
    fields = summarise(results, gold, ["g", "g", "g", "h"])["fields"]
    assert fields["a"]["recall_ci95"] == fields["a"]["edit_similarity_ci95"] == [1.0, 1.0]
    assert fields["b"]["edit_similarity"] == 0.75 and fields["b"]["edit_similarity_ci95"] == [0.75, 0.75]
    assert (fields["b"]["precision"], fields["b"]["recall_ci95"], fields["b"]["n"]) == (0, [0.0, 0.0], 3)


def test_regular_expressions_and_free_text():
    assert regex_receipt(RECEIPT) == GOLD
    assert free_value('Sure:\n```json\n{"a": 1}\n```') == {"a": 1}
    assert free_value("none") is None and free_value("{a}") is None


def test_evaluation_reports_every_system(run, tiny, parsed, jsonl, tmp_path):
    corpus = jsonl("c.jsonl", [{"document": RECEIPT, "gold": {**GOLD, "company": f"YONG {i}"}} for i in range(12)])
    options = ["--data", corpus, "--schema", SROIE, "--val_frac", 0.5, "--max_new_tokens", 24, "--limit", 3]
    done = run("eval_idp.py", "--model_dir", tiny, *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "out" / "report.json")
    assert list(report["systems"]) == ["regular expressions", str(tiny), f"{tiny} free"]
    assert report["systems"][str(tiny)]["valid"]["value"] == 1.0
    assert report["systems"]["regular expressions"]["fields"]["total"]["f1"] == 1.0
    lines = (tmp_path / "out" / f"{tiny.name}_constrained.jsonl").read_text().splitlines()
    shown = parsed(done.stdout.splitlines()[-1].removeprefix("next: "))
    assert shown.model_dir == str(tiny) and shown.details and (ROOT / shown.data).is_file()
    confidence = report["systems"][str(tiny)]["confidence"]
    assert confidence["whole document"]["n"] == 3 and "all values:" in done.stdout
    assert (
        len(lines) == 3
        and (tmp_path / "out" / "confidence.png").is_file()
        and (tmp_path / "out" / "f1_by_field.png").stat().st_size > 5000
    )
    assert (report["training_overlap"], report["overlap"], report["overlap_unknown"]) == ({str(tiny): 0}, 0, [])


def test_trained_documents_are_refused_and_an_unknown_overlap_is_said(run, tiny_adapter, jsonl, tmp_path):
    rows = [{"document": RECEIPT, "gold": {**GOLD, "company": f"YONG {i}"}} for i in range(12)]
    options = ["--data", jsonl("c.jsonl", rows), "--schema", SROIE, "--val_frac", 0.5, "--max_new_tokens", 24]
    command = ["eval_idp.py", "--model_dir", tiny_adapter("idp"), *options, "--limit", 1, "--out", tmp_path / "out"]
    done = run(*command)
    unknown = f"{tiny_adapter('idp')}: no train_rows.txt, so its overlap with the evaluation rows is unknown"
    assert done.returncode == 0 and unknown in done.stdout and unknown in done.stderr, done.stderr
    assert read_json(tmp_path / "out" / "report.json")["overlap_unknown"] == [str(tiny_adapter("idp"))]
    prompt = idp_prompt(read_json(SROIE), RECEIPT)
    (tiny_adapter("idp") / "train_rows.txt").write_text(row_hash(prompt) + "\n")
    done = run(*command)
    assert done.returncode == 2 and "trained on 1 of the 1 evaluation rows; expected none" in done.stderr


def test_a_document_and_its_gold_change_together():
    rows = [
        {"document": f"SHOP {i} LTD\nDate 1{i}/03/18\nTotal {i}0.50 cash RM{i}0.50", "group": str(i)}
        for i in range(1, 6)
    ]
    for i, row in enumerate(rows, 1):
        row["gold"] = {"company": f"SHOP {i} LTD", "date": f"1{i}/03/18", "total": f"{i}0.50", "address": "not there"}
    pool = shown_values(rows)
    assert set(pool) == {"company", "date", "total"}
    copies = [swap_values(row, pool, random.Random(seed)) for seed in range(20) for row in rows]
    for row, original in zip(copies, rows * 20, strict=True):
        shown = {k: v for k, v in row["gold"].items() if k != "address"}
        assert all(v in row["document"] for v in shown.values()) and row["gold"]["address"] == "not there"
        assert row["document"].count(row["gold"]["total"]) == 2  # where a value stands twice, both change
        assert row["group"] == original["group"]
    assert len({json.dumps(r["gold"]) for r in copies}) > 30
    assert {r["gold"]["date"] for r in copies} == {r["gold"]["date"] for r in rows}
    assert swap_values({"document": "[1]", "gold": [1]}, pool, random.Random(0)) == {"document": "[1]", "gold": [1]}


def test_a_swap_leaves_other_numbers_dates_and_fields_alone():
    document = "ABLE\nABLE STREET 8.10\nDATE 28.10.2018\n18.10 8.101\nTOTAL RM8.10"
    gold = {"company": "ABLE", "address": "ABLE STREET 8.10", "date": "28.10.2018", "total": "8.10"}
    row = {"document": document, "gold": gold}
    pool = {"total": ["33.50"], "company": ["BAKER"]}
    seen = {swap_values(row, pool, random.Random(seed))["document"] for seed in range(20)}
    assert seen == {document}  # either value stands in the address too, which would be lost
    row["gold"] = {**gold, "address": None}
    seen = {swap_values(row, pool, random.Random(seed))["document"] for seed in range(40)}
    assert "BAKER\nBAKER STREET 33.50\nDATE 28.10.2018\n18.10 8.101\nTOTAL RM33.50" in seen and len(seen) == 4


def test_copies_hold_no_value_of_held_out_or_development_rows(run, tmp_path):
    corpus = [
        {
            "document": f"COMPANY {i:02} LTD\nDATE 01-02-{10 + i}\nTOTAL {i}.{i:02}",
            "gold": {
                "company": f"COMPANY {i:02} LTD",
                "date": f"01-02-{10 + i}",
                "address": None,
                "total": f"{i}.{i:02}",
            },
        }
        for i in range(10, 50)
    ]
    source, schema = tmp_path / "corpus.jsonl", ROOT / "data" / "sroie_schema.json"
    source.write_text("".join(json.dumps(r) + "\n" for r in corpus))
    done = run("idp_prepare.py", "--src", source, "--schema", schema, "--outdir", tmp_path, "--copies", 3)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "idp_sft.jsonl").read_text().splitlines()]
    n = int(re.search(r"(\d+) training documents", done.stdout)[1])
    originals = [row_hash(r["input"]) for r in dev_split(rows[:n])[0]]
    assert all("copy_of" not in r for r in rows[:n]) and [r["copy_of"] for r in rows[n:]] == 3 * originals
    train, dev = dev_split(rows)
    own = {r["output"] for r in rows[:n]}
    assert len(dev) and len(rows) == n + 3 * (n - len(dev)) and all(r["output"] in own for r in dev)
    lent = {json.loads(r["output"])["company"] for r in train}
    assert not lent & {json.loads(r["output"])["company"] for r in dev}
    assert lent <= {json.loads(r["output"])["company"] for r in rows[:n]} and len({r["output"] for r in train}) > n


# What a large model answered


def receipt(company, total="80.90", extra=""):
    text = RECEIPT.replace("YONG ENTERPRISE", company).replace("80.90", total) + extra
    return {"document": text}, {**GOLD, "company": company, "total": total}


@pytest.mark.parametrize(
    ("company", "document", "leaks"),
    [
        ("YONG ENTERPRISE", "another receipt", True),  # the same company
        ("Yong Enterprise Sdn. Bhd.", "another receipt", True),  # in another spelling
        ("GARDENIA BAKERIE (KL) SDN BHD", "another receipt", True),  # a letter misread
        ("SOME SHOP", "invoice of GARDENIA  BAKERIES (KL)", True),  # named in the document
        ("SOME SHOP", "SOMEWHERE\n" + RECEIPT, True),  # the same receipt, its company misread
        ("SOME SHOP", "a receipt of a shop that nobody holds out", False),
        (None, "a receipt without a company", False),
    ],
)
def test_a_teachers_row_that_tells_of_a_held_out_company_is_dropped(company, document, leaks):
    held = [{"document": RECEIPT, "gold": GOLD}]
    held.append({"document": "x", "gold": {**GOLD, "company": "GARDENIA BAKERIES (KL) SDN BHD"}})
    rows = [{"document": document, "teacher": {**GOLD, "company": company}}]
    assert without_held_out(rows, held, "company") == ([] if leaks else rows, int(leaks))


def test_rows_that_only_a_large_model_answered_become_kd_rows(run, jsonl, tmp_path):
    gold = [{**d, "gold": g} for d, g in (receipt(f"SHOP {'ABCDEFGHIJ'[i] * 5}", f"{i}5.00") for i in range(10))]
    source = jsonl("gold.jsonl", gold)
    taught = [{**d, "teacher": g} for d, g in (receipt(f"STORE {'KLMNOPQRST'[i] * 7}") for i in range(6))]
    for row in taught:
        row["document"] = row["document"].replace("JALAN DEDAP", f"{row['teacher']['company'][-3:]} ROAD TO NOWHERE")
    taught[0]["teacher"] = json.dumps(taught[0]["teacher"])  # the answer's text
    taught[1]["teacher"] = "I cannot read this"
    path = tmp_path / "teacher.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in taught).encode()))

    def prepare(*more):
        options = ["--schema", SROIE, "--outdir", tmp_path / "out", "--val_frac", 0.5, *more]
        done = run("idp_prepare.py", "--src", source, path, *options)
        assert done.returncode == 0, done.stderr
        paths = [tmp_path / "out" / f"idp_{name}.jsonl" for name in ("kd", "sft")]
        kd, sft = ([json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths)
        return kd, sft, done.stdout

    kd, sft, said = prepare("--repeat_gold", 2)
    assert "teacher's answers left out: 1 not of the schema" in said
    assert len(kd) == 2 * len(sft) + 5 and [r["teacher_output"] for r in kd[: len(sft)]] == [r["output"] for r in sft]
    assert {json.loads(r["teacher_output"])["company"][:5] for r in kd[-5:]} == {"STORE"}
    assert len(prepare("--repeat_gold", 0)[0]) == 5
    first, other = ({r["input"] for r in prepare("--val_start", start)[1]} for start in (0, 0.5))
    assert not first & other and len(first | other) == 10  # two halves: each document is held out once


def test_a_corpus_row_needs_an_answer(jsonl):
    with pytest.raises(UserError, match="row 1: field 'gold' is missing, and 'teacher' too"):
        read_answers([jsonl("c.jsonl", [{"document": "x"}])], read_json(SROIE), "company")
