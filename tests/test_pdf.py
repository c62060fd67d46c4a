"""PDF files as documents: the text layer in reading order, and one line for every file that has none to give."""

import sys

import pytest

from distill.files import UserError
from distill.tasks.pdf_text import read_pdf

TABLE = [("ACME LTD", "", ""), ("Item", "Qty", "Amount"), ("Café beans", "2", "10.00"), ("Total", "", "10.00")]


@pytest.fixture
def pdf(tmp_path):
    """pdf("name", [table or None, ...]) -> a PDF with a page for each, drawn by another library; None is an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.backends.backend_pdf import PdfPages

    def draw(name, pages):
        with PdfPages(tmp_path / name) as out:
            for table in pages:
                figure = plt.figure(figsize=(4, 3))
                if table is None:
                    figure.figimage([[0.0, 1.0], [1.0, 0.0]])
                for line, cells in enumerate(table or []):
                    for x, text in zip((0.6, 0.8, 0.1), (cells[1], cells[2], cells[0]), strict=True):  # out of order
                        figure.text(x, 0.9 - 0.1 * line, text)
                out.savefig(figure)
                plt.close(figure)
        return tmp_path / name

    return draw


def test_a_missing_package_or_file_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        read_pdf(tmp_path / "a.pdf", 1000)
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(UserError, match=r"a\.pdf: a PDF takes one more package: pip install -r requirements-pdf\.txt$"):
        read_pdf(tmp_path / "a.pdf", 1000)


@pytest.mark.extra("pypdf")
def test_text_is_in_the_order_of_the_page(pdf, capsys):
    text = read_pdf(pdf("a.pdf", [TABLE, None, [("page three", "", "")]]), 10_000)
    assert [line.split() for line in text.splitlines()] == [
        ["ACME", "LTD"],
        ["Item", "Qty", "Amount"],
        ["Café", "beans", "2", "10.00"],
        ["Total", "10.00"],
        ["page", "three"],
    ]
    assert "a.pdf: no text on page 2 (scanned?): left out" in capsys.readouterr().err
    assert "page three" not in read_pdf(pdf("a.pdf", [TABLE, [("page three", "", "")]]), 20)  # enough for an error


@pytest.mark.extra("pypdf")
def test_scans_encrypted_and_damaged_files_are_one_line(pdf, tmp_path):
    import pypdf

    whole = pdf("a.pdf", [TABLE])
    with pytest.raises(UserError, match=r"scan\.pdf: no text on its 2 pages, as in a scan; expected a PDF after OCR"):
        read_pdf(pdf("scan.pdf", [None, None]), 1000)
    for password, readable in (("", True), ("secret", False)):
        writer = pypdf.PdfWriter(clone_from=whole)
        writer.encrypt(password, "owner", algorithm="RC4-128")
        writer.write(tmp_path / "locked.pdf")
        if readable:  # only what may be done with it is restricted
            assert "ACME" in read_pdf(tmp_path / "locked.pdf", 1000)
        else:
            with pytest.raises(UserError, match=r"locked\.pdf: encrypted; expected a PDF that opens without"):
                read_pdf(tmp_path / "locked.pdf", 1000)
    data = whole.read_bytes()
    for broken in (
        data[: len(data) // 2],
        b"hello",
        b"",
        b"%PDF-1.4\n" + bytes(500),
        data.replace(b"/Pages", b"/Pagez"),
    ):
        (tmp_path / "broken.pdf").write_bytes(broken)
        with pytest.raises(
            UserError, match=r"broken\.pdf: (not a PDF that can be read|no text on its 0 pages)"
        ) as error:
            read_pdf(tmp_path / "broken.pdf", 1000)
        assert "\n" not in str(error.value)


@pytest.mark.extra("pypdf")
def test_infer_idp_reads_a_pdf(run, tiny, pdf):
    schema = "data/sroie_schema.json"
    options = ["--model_dir", tiny, "--schema", schema, "--max_new_tokens", 40]
    done = run("infer_idp.py", *options, "--data", pdf("a.pdf", [TABLE]))
    assert done.returncode == 0 and done.stdout.startswith("{"), done.stderr
    done = run("infer_idp.py", *options, "--data", pdf("scan.PDF", [None]))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "as in a scan" in done.stderr
