"""Files: the resumable JSONL; and a process's rank."""

import argparse
import json
import runpy
import sys

import pytest
from conftest import ROOT

from distill.files import ResumableJsonl, UserError, cli, launched_rank, read_text, write_json
from distill.tasks.creditmix import read_table
from distill.tasks.pdf_text import read_pdf


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("header", [None, {"model": "m", "n": 2}])
def test_rows_are_there_again_and_more_are_appended(tmp_path, header):
    path, head = tmp_path / "new" / "x.jsonl", [header] if header else []
    ResumableJsonl(path, header).append({"a": 1}, {"a": "ü\n"})
    again = ResumableJsonl(path, header)
    assert again.rows == [{"a": 1}, {"a": "ü\n"}]
    again.append({"a": 3})
    assert lines(path) == [*head, {"a": 1}, {"a": "ü\n"}, {"a": 3}] and again.rows == lines(path)[len(head) :]
    again.truncate(1)
    assert lines(path) == [*head, {"a": 1}] and ResumableJsonl(path, header).rows == [{"a": 1}]


@pytest.mark.parametrize("torn", [b'{"a": 2', b'{"a": 2}', '{"a": "ü'.encode()[:-1]])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)
    cache = ResumableJsonl(path)
    assert cache.rows == [{"a": 1}]
    cache.append({"a": 3})
    assert lines(path) == [{"a": 1}, {"a": 3}]


def test_a_torn_header_is_written_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"mod')
    ResumableJsonl(path, {"model": "m"})
    assert lines(path) == [{"model": "m"}]


def test_another_header_is_refused_and_the_file_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    ResumableJsonl(path, {"model": "m", "seed": 1, "n": 2}).append({"a": 1})
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"x\.jsonl: begun with other settings or inputs \(seed, k\); expected the same"
    ):
        ResumableJsonl(path, {"model": "m", "seed": 7, "n": 2, "k": 3})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"), [("nonsense", ":2: not JSON"), ("[1]", ":2: expected an object, got list")]
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 3}}\n')
    with pytest.raises(UserError, match=message):
        ResumableJsonl(path)


@pytest.mark.parametrize(("use", "more"), [(read_text, ()), (read_pdf, (1,)), (read_table, ([],)), (write_json, ({},))])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, use, more):
    folder = tmp_path / "x.csv"
    folder.mkdir()
    with pytest.raises(UserError, match=r"/x\.csv: is a folder, expected a file$"):
        use(folder, *more)
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x"},
        {"RANK": "x"},
    ],
)
def test_a_rank_without_a_launcher_is_an_error(monkeypatch, capsys, variables):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() == 0
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["eval_creditmix.py"])
    with pytest.raises(SystemExit) as e:
        cli(lambda args: pytest.fail("it ran"), argparse.ArgumentParser())
    assert e.value.code == 2 and f"error: RANK={variables['RANK']}: no launcher" in capsys.readouterr().err


def test_a_launched_process_has_its_rank(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == 1


IDP = ["--data", "data/idp_corpus.jsonl", "--schema", "data/idp_schema.json"]


@pytest.mark.parametrize(
    ("script", "flag", "others"),
    [
        ("eval_creditmix", "--out", ["--model_dir", "no/such/model"]),
        ("eval_idp", "--out", ["--model_dir", "no/such/model", *IDP]),
        ("eval_codegen", "--out", ["--model_dir", "no/such/model"]),
        ("creditmix_prepare", "--outdir", ["--src", "data/creditmix_dataset.json"]),
        ("idp_prepare", "--outdir", ["--src", *IDP[1:]]),
        ("codegen_prepare", "--out_dir", []),
    ],
)
@pytest.mark.parametrize("place", ["file", "file/under/it"])
def test_a_file_in_the_place_of_an_output_folder_is_refused_at_start(
    script, flag, others, place, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, flag, str(tmp_path / place), *others])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(f"{script}.py", run_name="__main__")
    said = capsys.readouterr()
    expected = f"error: {flag} {tmp_path / place}: {tmp_path / 'file'} is a file; expected a folder\n"
    assert (stopped.value.code, said.err, said.out) == (2, expected, "")
    assert (tmp_path / "file").read_text() == "mine"
