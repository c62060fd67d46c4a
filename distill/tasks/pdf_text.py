"""The text layer of a PDF, for documents to extract from.

pypdf is optional (requirements-pdf.txt) and imported only here. Its layout mode keeps lines and columns as a reader
sees them; in the order of the file, the cells of a table come apart.
"""

import logging
import sys
from pathlib import Path

from distill.files import UserError, check_file, one_line


def read_pdf(path: Path, most: int) -> str:
    """The text of a PDF, page after page without blank lines; reading ends after more than `most` characters.

    Pages without text are left out with a warning. Errors: UserError, one line, where pypdf is not installed, and for a
    file that is missing, a folder, damaged, encrypted, or without any text, as scans are.
    """
    check_file(path)
    try:
        import pypdf
    except ImportError:
        raise UserError(f"{path}: a PDF takes one more package: pip install -r requirements-pdf.txt") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it comments on every flaw that it gets over
    lines, empty, size, number = [], [], 0, 0
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{path}: encrypted; expected a PDF that opens without a password")
        for number, page in enumerate(reader.pages, 1):
            found = page.extract_text(extraction_mode="layout").splitlines()
            found = [line.rstrip() for line in found if line.strip()]
            empty += [number] * (not found)
            lines += found
            size += sum(len(line) + 1 for line in found)
            if size > most:
                break
    except pypdf.errors.DependencyError as e:  # a cipher that pypdf leaves to another package
        raise UserError(f"{path}: encrypted: {one_line(e)}; expected a PDF without encryption") from None
    except UserError:
        raise
    except Exception as e:  # a damaged file can fail anywhere in the parser, with any type of error
        raise UserError(f"{path}: not a PDF that can be read: {one_line(e)}") from None
    if not lines:
        raise UserError(f"{path}: no text on its {number} pages, as in a scan; expected a PDF after OCR, or its text")
    if empty:
        print(f"warning: {path}: no text on page {', '.join(map(str, empty))} (scanned?): left out", file=sys.stderr)
    return "\n".join(lines)
