"""Files and errors: one line for the user where something is wrong with a file, and no file half-written."""

import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent  # of the project


class UserError(Exception):
    """An error that the user can fix. The message is one line: file, line, field, what was expected."""


def printable(text: str) -> str:
    """Text that is safe on a terminal: what is not printable, but for line breaks and tabs, as a Python escape.

    That covers escape sequences, carriage returns and characters that change the direction of the text.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cli(main: Callable, parser: ArgumentParser):
    """Run `main` with the command line's arguments. An error that the user can fix is one line, with exit code 2.

    Such errors are UserError, errors of the operating system, and flags that `parser` refuses. Flags may not be
    abbreviated: --mode would be taken for --model_dir. Under `accelerate launch` only the first process writes to
    standard output.
    """
    parser.allow_abbrev = False
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the flags)\n")
    for argument in sys.argv[1:]:
        if any("\ud800" <= c <= "\udfff" for c in argument):  # how Python passes on bytes that are not UTF-8
            parser.error(f"argument {argument!r}: expected UTF-8")
    args = parser.parse_args()
    try:
        if launched_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return main(args)
    except UserError as e:
        message = str(e)
    except OSError as e:  # full disk, missing permission, ...
        message = f"{e.filename or 'file system'}: {e.strerror or e}"
    except (SafetensorError, RuntimeError) as e:  # how safetensors and torch report a full disk
        if not re.search(r"I/O error|writing file|out of memory", str(e)):
            raise
        message = str(e).split("\n")[0]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if "tqdm" in sys.modules:  # an open progress bar would share its line with the error
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def launched_rank() -> int:
    """This process's number, RANK, among those that a launcher started; 0 without a launcher.

    Errors: UserError for a number without the launcher's other variables: all but process 0 leave the work to it.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    known = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
    if not known or (int(rank) and not os.environ.get("MASTER_ADDR")):
        raise UserError(
            f"RANK={rank}: no launcher has set WORLD_SIZE and MASTER_ADDR to match; expected `accelerate launch`, or "
            "RANK unset"
        )
    return int(rank)


def number(kind: type, allowed: Callable, name: str) -> Callable:
    """An argparse type: an int or float for which `allowed` is true. The error message calls it `name`."""

    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise ValueError
        return value

    parse.__name__ = f"{name}, {kind.__name__}"
    return parse


def positive(kind: type) -> Callable:
    """An argparse type: an int or float above zero."""
    return number(kind, lambda value: 0 < value < float("inf"), "number above 0")


def between(kind: type, low: float, high: float) -> Callable:
    """An argparse type: an int or float from `low` to `high`, both included."""
    return number(kind, lambda value: low <= value <= high, f"number from {low} to {high}")


@contextmanager
def atomic_write(path: str | Path, mode: str = "w"):
    """Open `path` for writing under a temporary name. The file appears by rename: whole, or not at all.

    Error: UserError, before anything is written, where `path` is a folder.
    """
    path = Path(path)
    refuse_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: str | Path, obj: object) -> None:
    with atomic_write(path) as f:
        json.dump(obj, f, indent=1, ensure_ascii=False)
        f.write("\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with atomic_write(path) as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def _unicode(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("Unicode text (a lone surrogate is half a character)")
    return text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("text that is not blank")
    return text


Text = Annotated[str, AfterValidator(_unicode)]  # may be empty
FilledText = Annotated[Text, AfterValidator(_filled)]


class StrictModel(BaseModel):
    """What a row or a file must hold. Values are of the type named (a bool is no int); other fields are allowed."""

    model_config = ConfigDict(strict=True)


ModelT = TypeVar("ModelT", bound=StrictModel)


class ResumableJsonl:
    """Rows that a stopped run continues from: a JSONL file that grows by appending.

    rows: the rows of the file (dicts), in order. A kill can tear the last line only; opening the file cuts it off.
    """

    def __init__(self, path: str | Path, header: dict | None = None):
        """Open `path`, or begin it.

        header: what the rows depend on, as plain JSON values; it is the first line of the file. Without one the caller
        checks the rows itself.
        Errors: UserError when the file begins with another header, or names a line that is no JSON object.
        """
        self.path, self.header, self.rows = Path(path), header, []
        data = self.path.read_bytes() if self.path.is_file() else b""
        *lines, torn = data.split(b"\n")
        if torn:
            os.truncate(self.path, len(data) - len(torn))
        for i, line in enumerate(lines, 1):
            row = parse_json(line.decode("utf-8", "replace"), self.path, i)
            validate(f"{self.path}:{i}", row, StrictModel)
            self.rows.append(row)
        if header is not None and self.rows:
            found = self.rows.pop(0)
            other = [name for name in found | header if found.get(name) != header.get(name)]
            if other:
                raise UserError(
                    f"{self.path}: begun with other settings or inputs ({', '.join(other)}); expected the same, or "
                    "another place to write"
                )
        elif header is not None:
            self.truncate(0)

    def append(self, *rows: dict):
        """Add rows to the file, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with open(self.path, "ab") as f:
            f.write(lines)
        self.rows += rows

    def truncate(self, n: int):
        """Keep the first n rows."""
        del self.rows[n:]
        write_jsonl(self.path, self.rows if self.header is None else [self.header, *self.rows])


def refuse_folder(path: str | Path) -> None:
    """UserError where `path` is a folder."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, expected a file")


def check_output_folder(flag: str, path: Path) -> None:
    """UserError, naming the flag, where no folder can be made at `path`: it, or what it would stand in, is a file."""
    found = next((p for p in (path, *path.parents) if p.exists()), None)
    if found and not found.is_dir():
        raise UserError(f"{flag} {path}: {found} is a file; expected a folder")


def check_file(path: str | Path) -> None:
    """UserError unless `path` is a file, saying whether it is missing or a folder."""
    refuse_folder(path)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file or of standard input (-); UserError when it is missing, a folder, empty or not text."""
    path = Path(path)
    if str(path) != "-":
        check_file(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path}: not a gzip file: {one_line(e)}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: expected UTF-8 text; invalid byte at {e.start}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def parse_json(text: str, path: str | Path, line: int | None = None):
    """The value of a JSON text; UserError naming file and line (`line`, or the line within the text)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{line or e.lineno}: not JSON: {e.msg}") from None
    except (ValueError, RecursionError) as e:  # JSON, but a number or a depth that Python does not take
        place = f"{path}:{line}" if line else path
        raise UserError(f"{place}: {'nested too deep' if isinstance(e, RecursionError) else e}") from None


def read_json(path: str | Path):
    return parse_json(read_text(path), path)


def read_rows(path: str | Path, model: type[StrictModel]) -> list[dict]:
    """Rows of a JSON list or a JSONL file (- for standard input) as dicts with all their fields, each checked.

    Errors: UserError naming file, line (or item of the list), field and what was expected.
    """
    rows = placed_rows(path, read_text(path))
    for place, row in rows:
        validate(place, row, model)
    return [row for _, row in rows]


def placed_rows(path: str | Path, text: str) -> list[tuple[str, object]]:
    """[(place, row)] of the text of a JSON list or a JSONL file, unchecked. The place names file and line, or item."""
    if str(path).endswith(".json") or text.lstrip().startswith("["):
        rows = parse_json(text, path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
        placed = [(f"{path}: item {i}", row) for i, row in enumerate(rows, 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        placed = [(f"{path}:{i}", parse_json(line, path, i)) for i, line in lines if line.strip()]
    if not placed:
        raise UserError(f"{path}: no rows")
    return placed


def validate(place: str | Path, value: object, model: type[ModelT]) -> ModelT:
    """The value as an instance of `model`; UserError beginning with `place` for the first field that does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as e:
        errors = e.errors(include_url=False)
    if not errors[0]["loc"]:
        raise UserError(f"{place}: expected an object, got {type(value).__name__}")
    field, got = errors[0]["loc"][0], errors[0]["input"]
    if errors[0]["type"] == "missing":
        required = sorted(info.alias or name for name, info in model.model_fields.items() if info.is_required())
        raise UserError(f"{place}: field '{field}' is missing; expected {required}")
    # a union has one error for each of its types
    reasons = [
        re.sub("^(Input should be|List should have|Value error,) ", "", x["msg"])
        for x in errors
        if x["loc"][0] == field
    ]
    raise UserError(f"{place}: field '{field}': expected {' or '.join(dict.fromkeys(reasons))}, got {got!r:.40}")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
