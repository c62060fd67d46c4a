"""Confidence and grounding of extracted values: by hand, against a plain forward pass, and in the scripts."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

from common import load_model, prompt_ids
from distill.evaluate import confidence_figures
from distill.files import read_json, write_json
from distill.model.log_probs import completion_log_probs
from distill.report import confidence_table, draw_confidence
from distill.tasks.idp_confidence import confidences, leaf_probabilities, tokens_of
from distill.tasks.idp_decode import Vocabulary
from distill.tasks.idp_documents import schema_warning
from distill.tasks.idp_grounding import DocumentText, details, readings
from distill.tasks.idp_leaves import Leaf, leaves_of
from distill.tasks.idp_schema import compact, schema_sha256
from distill.tasks.idp_score import right_leaves
from distill.train.data import describe
from eval_idp import ALL, DOCUMENT, confidence_report, judge_confidence
from infer_idp import main

SROIE = ROOT / "data" / "sroie_schema.json"


@pytest.mark.parametrize("value", [{"é": [{"b": 1.5, "c": "x\n"}, {}], "d": None}, [[], ["a"]], 5, "x", {}])
def test_leaves_are_where_the_text_has_them(value):
    text = compact(value).encode()
    assert all(text[leaf.start : leaf.end].decode() == compact(leaf.value) for leaf in leaves_of(value))
    assert len(leaves_of({"é": [{"b": 1.5, "c": "x\n"}, {}], "d": None})) == 4


def test_paths_and_fields():
    leaves = leaves_of({"items": [{"n": 1}, {"n": [2, 3]}], "e": []})
    assert [leaf.path for leaf in leaves] == ["items[0].n", "items[1].n[0]", "items[1].n[1]", "e"]
    assert [leaf.field for leaf in leaves] == ["items[].n", "items[].n[]", "items[].n[]", "e"]


def test_the_tokens_of_a_leaf_by_hand():
    """{"a":"xy","n":12,"z":null} in tokens of which some are shared by a value and its surroundings."""
    tokens = ['{"', "a", '":"', "x", 'y","', "n", '":', "1", "2", ',"', "z", '":null', "}"]
    ends = np.cumsum([len(t) for t in tokens])
    leaves = leaves_of({"a": "xy", "n": 12, "z": None})
    assert ["".join(tokens[tokens_of(leaf, ends)]) for leaf in leaves] == ['":"xy","', '12,"', '":null']
    # a number that the answer ends with takes the token that ends the answer
    assert tokens_of(leaves_of(12)[0], np.array([1, 2])) == slice(0, 3)
    assert tokens_of(leaves_of(True)[0], np.array([4])) == slice(0, 1)
    assert tokens_of(Leaf("n", 5, 5, 6), np.array([5, 7, 8])) == slice(1, 2)  # its token ends it: "5,"


def test_confidence_is_the_joint_probability_of_the_values_tokens(tiny):
    model, tokenizer = load_model(tiny)
    table = Vocabulary.of(tokenizer, model.config.vocab_size).table
    answer = {"company": "ACME", "total": 5}
    found = leaf_probabilities(model, tokenizer, table, "a document", answer)
    prompt = prompt_ids(tokenizer, ["a document"])[0]
    ids = tokenizer('{"company":"ACME","total":5}', add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.inference_mode():
        logs = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    logs = logs.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert completion_log_probs(model, prompt, ids) == pytest.approx(logs.numpy(), abs=1e-4)
    texts = tokenizer.convert_ids_to_tokens(ids)
    first, number = texts.index('":"'), texts.index("5")
    company = logs[first : texts.index('","') + 1].sum().exp().item()
    assert found == pytest.approx([company, logs[number : number + 2].sum().exp().item()], rel=1e-3)


def test_merged_values_take_the_confidence_of_their_piece(monkeypatch):
    known = {"one": [0.9, 0.1, 0.2], "two": [0.8, 0.3, 0.4]}
    monkeypatch.setattr("distill.tasks.idp_confidence.leaf_probabilities", lambda m, t, v, message, a: known[message])
    pieces = [("one", {"a": None, "l": [1, 2]}), ("two", {"a": "x", "l": [2, 2]})]
    merged = {"a": "x", "l": [1, 2, 2]}  # the 2 of the seam once
    assert confidences(None, None, None, pieces, merged) == [0.8, 0.1, 0.2, 0.3]


DOCUMENT_TEXT = """ACME SDN.BHD  Rechnung INV-17 vom 5. März 2023
Total RM5.00 EUR 1.234,56 und 1 234,50; 12kg; A/C 10'000.00
17 25/12/18, x12.03.2019, March 5th, 2024, 20180312 東京株式会社本店"""


@pytest.mark.parametrize(
    ("value", "grounded"),
    [
        ("Acme Sdn Bhd", True),
        ("CME", False),  # not from the start of a word
        ("inv 17", True),
        ("NV17", False),
        ("Bhd\nRechnung", True),  # white space does not count
        ("株式会社", True),
        ("12 KG", True),
        ("5.00", True),
        (5, True),
        (500, False),
        (-5.0, True),
        (1234.56, True),
        ("RM 1,234.50", True),
        (10000, True),
        (0.05, False),
        (10**400, False),
        ("2023-03-05", True),
        ("2018-12-25", True),
        ("25 Dec 2018", True),
        ("2019-03-12", True),
        ("2019-12-03", True),  # the other order
        ("2024-03-05", True),
        ("2018-03-13", False),
        ("20180312", True),
        (None, None),
        ("", None),
        ("--", None),
        (True, None),
        ([], None),
    ],
)
def test_grounded(value, grounded):
    assert DocumentText(DOCUMENT_TEXT).holds(value) is grounded


def test_readings_of_numbers():
    assert readings("1.234") == {1.23, 1234} and readings("1,234.50") == readings("1'234,5") == {1234.5}
    assert readings("1.234.567") == {1234567} and readings("12.03.2018") == {12, 3, 2018} and readings("80") == {80}


def test_a_listed_value_is_no_quotation():
    schema = {"properties": {"type": {"enum": ["invoice", "receipt"]}, "items": {"items": {"const": 7}}}}
    found = details({"type": "receipt", "items": [7], "name": "X"}, "Invoice 3", schema, [0.1234567, 1.0, 0.5])
    assert found[0] == {"path": "type", "value": "receipt", "confidence": 0.123457, "grounded": None}
    assert [leaf["grounded"] for leaf in found] == [None, None, False]
    assert details({"type": "invoice"}, "Invoice 3", schema)[0] | {"value": 0} == {
        "path": "type",
        "value": 0,
        "confidence": None,
        "grounded": True,
    }


def test_right_leaves_by_hand():
    gold = {"a": "X.", "n": None, "l": [{"d": 1.0}, {"d": 2}], "e": []}
    found = {"a": "x", "n": "", "l": [{"d": 2}, {"d": "2.00"}, {"d": 1}], "e": []}
    assert right_leaves(leaves_of(found), gold) == [True, True, True, False, True, True]


def test_figures_of_a_confidence_by_hand():
    confidence = np.array([0.95, 0.95, 0.85, 0.35, 0.3])
    right = np.array([True, True, False, True, False])
    m = confidence_figures(confidence, right)
    assert (m["n"], m["accuracy"], m["mean_confidence"]) == (5, 0.6, pytest.approx(0.68))
    assert (m["coverage_at_5_percent_error"], m["threshold"]) == (0.4, 0.95)
    bins = [(b["from"], b["n"], b["accuracy"]) for b in m["reliability"]]
    assert bins == [(0.3, 2, 0.5), (0.8, 1, 0.0), (0.9, 2, 1.0)]
    assert m["ece"] == pytest.approx((2 * 0.05 + 0.85 + 0.65 + 0.3) / 5)
    assert m["act_above"][3] == {"p": 0.8, "coverage": 0.6, "error": pytest.approx(1 / 3)}
    assert confidence_figures(confidence, np.zeros(5, bool))["threshold"] is None


def test_the_report_of_confidences(tmp_path):
    def leaf(path, value, confidence, grounded):
        return {"path": path, "value": value, "confidence": confidence, "grounded": grounded}

    gold = [{"a": "x", "b": 1}, {"a": "y", "b": 2}]
    results = [
        {"value": {"a": "x", "b": 1}, "details": [leaf("a", "x", 0.9, True), leaf("b", 1, 0.8, True)]},
        {"value": {"a": "z", "b": 2}, "details": [leaf("a", "z", 0.2, False), leaf("b", 2, 0.7, None)]},
        {"value": None, "details": []},  # an error in place of a result
    ]
    judged = judge_confidence(results, [*gold, {"a": "x"}])
    assert judged[DOCUMENT][:, :2].tolist() == [[0.8, 1], [0.2, 0]] and list(judged) == ["a", "b", ALL, DOCUMENT]
    report = confidence_report(judged)
    assert report["a"]["grounded"] == {"yes": {"n": 1, "accuracy": 1.0}, "no": {"n": 1, "accuracy": 0.0}}
    rows = np.array([[0.9, 1, 1], [0.95, 0, 0], [0.2, 0, 0], [0.1, 0, np.nan]])
    found = confidence_report({"a": rows})["a"]
    assert (found["coverage_at_5_percent_error"], found["coverage_at_5_percent_error_grounded"]) == (0.0, 0.25)
    assert report[ALL]["n"] == 4 and report[ALL]["coverage_at_5_percent_error"] == 0.75
    lines = confidence_table("m", report, ALL)
    assert " ".join(lines[3].split()) == "a 2 0.500 0.550 0.150 0.500 0.900 0.500 1.000 of 1; 0.000 of 1"
    assert lines[-1].endswith("0.70: 0.75, 0.000; 0.80: 0.50, 0.000; 0.90: 0.25, 0.000; 0.95: 0.00, -")
    draw_confidence({"m": tuple(judged[ALL].T[:2])}, tmp_path / "confidence.png")
    assert (tmp_path / "confidence.png").stat().st_size > 5000
    assert judge_confidence([results[2]], [{}]) == {}


def test_a_schema_other_than_the_trained_one_is_said(tmp_path):
    schema = read_json(SROIE)
    assert schema_warning(str(tmp_path), schema) is None  # nothing is known
    for trained, warned in (([schema_sha256(schema)], False), (["0123"], True), ([], True)):
        write_json(tmp_path / "run.json", {"schema_sha256": trained})
        assert bool(schema_warning(str(tmp_path), schema)) is warned
    other = {**schema, "title": "another"}
    write_json(tmp_path / "run.json", {"schema_sha256": [schema_sha256(schema)]})
    asked = f"trained with schema {schema_sha256(schema)}, asked with {schema_sha256(other)}"
    assert asked in schema_warning(str(tmp_path), other)


def test_training_records_the_schema_of_its_rows(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    rows = [{**row, "schema_sha256": name} for name in ("b", "a", "b")]
    assert describe(tokenizer, [*rows, row], {}, {})["schema_sha256"] == ["a", "b"]
    assert describe(tokenizer, [row], {}, {})["schema_sha256"] == []


def test_details_of_rows_from_standard_input(tiny, monkeypatch, capsys):
    """Ids are kept, each value has its confidence, and the output is the same as without --details."""
    rows = [{"id": "r1", "document": "ACME TOTAL 5.00"}, {"id": "r2", "document": "SHOP"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    options = {
        "document": None,
        "data": Path("-"),
        "out": Path("-"),
        "model_dir": str(tiny),
        "schema": SROIE,
        "lenient": False,
    }
    options |= {"endpoint": None, "endpoint_model": None, "max_new_tokens": 40, "batch_size": 2, "precision": "auto"}
    printed = {}
    for wanted in (True, False):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
        main(SimpleNamespace(**options, details=wanted))
        out, err = capsys.readouterr()
        printed[wanted] = [json.loads(line) for line in out.splitlines()]
        assert f"warning: {tiny}: no adapter" in err and "2 results, all valid" in err
    assert [r["id"] for r in printed[True]] == ["r1", "r2"]
    assert all(0 <= leaf["confidence"] <= 1 for r in printed[True] for leaf in r.pop("details"))
    assert printed[True] == printed[False]
