"""IDP: documents to JSON that validates against a schema, every time.

    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --document "INVOICE 17 ..."
    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --data receipt.pdf --details
    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --data docs.jsonl --out out.jsonl

With a server that holds the model (llama.cpp, Ollama, vLLM):

    python infer_idp.py --endpoint http://127.0.0.1:8080/v1 --schema data/idp_schema.json --document "INVOICE 17 ..."

On a CPU, with the embedded student untrained:

    python infer_idp.py --model_dir smollm2-135m --schema data/sroie_schema.json --document "ACME LTD  TOTAL 5.00"

A result is printed only after it has passed Draft202012Validator, formats included. A document longer than the model's
context is read in overlapping pieces, whose results are merged (distill/tasks/idp_documents.py). --details adds how
sure the model is of each value (idp_confidence.py) and whether it stands in the document (idp_grounding.py).

Each output row repeats its input row, with its id and whatever else it holds, and adds "line" and "output" or "error".
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from common import load_model, row_hash
from distill.files import ResumableJsonl, UserError, cli, positive, read_json, read_rows, read_text, write_jsonl
from distill.model.hub import adapter_sha256
from distill.tasks.endpoint import Endpoint
from distill.tasks.idp_confidence import confidences
from distill.tasks.idp_corpus import DocumentRow
from distill.tasks.idp_decode import Constraint, Vocabulary
from distill.tasks.idp_documents import MAX_CHARS, Extraction, check_document, extract, extract_from, schema_warning
from distill.tasks.idp_grounding import details
from distill.tasks.idp_schema import check_schema, compact
from distill.tasks.pdf_text import read_pdf

BATCHES = 4  # batches per write of the results; a stopped run loses at most these
OWN = ("line", "output", "error", "details")  # what a result adds to its row


def main(args):
    try:
        schema = read_json(args.schema)
        grammar = check_schema(schema, args.lenient or bool(args.endpoint))
    except RecursionError:
        raise UserError(f"{args.schema}: nested too deep to be read") from None
    rows = read_documents(args.document, args.data, args.out)
    if args.endpoint:
        endpoint, sure = Endpoint(args.endpoint, args.endpoint_model), None
        name = f"{endpoint.url} {endpoint.model}"
        if args.details:
            print("--endpoint: no confidence, which needs the model here; grounded is there", file=sys.stderr)

        def read(documents, first):
            return extract_from(endpoint, documents, schema, args.max_new_tokens, args.batch_size, first)
    else:
        name, (model, tokenizer) = args.model_dir, load_model(args.model_dir, args.precision)
        warn(name, schema)
        vocab = Vocabulary.of(tokenizer, model.config.get_text_config().vocab_size)
        constraint = Constraint.of(grammar, vocab, args.max_new_tokens)

        def read(documents, first):
            return extract(model, tokenizer, documents, schema, constraint, args.max_new_tokens, args.batch_size, first)

        def sure(extraction):
            return confidences(model, tokenizer, vocab.table, extraction.pieces, extraction.value)

    def answer(documents, first=1):
        found = read(documents, first)
        return [result(e, d, schema, args.details, sure) for e, d in zip(found, documents, strict=True)]

    if args.out:
        keys = result_keys(name, schema, args.max_new_tokens, [r["document"] for r in rows], args.details)
        write_results(answer, rows, keys, args.batch_size * BATCHES, args.out)
    else:
        (found,) = answer([rows[0]["document"]])
        if "error" in found:
            raise UserError(found["error"])
        print(shown(found))


def read_documents(document: str | None, data: Path | None, out: Path | None) -> list[dict]:
    """Rows {"document", ...} of --document (text, or - for standard input) or --data.

    --data holds rows as .jsonl or standard input (-), which need `out`; any other file is one document, text or PDF.
    """
    if document == "-":
        try:
            return [{"document": check_document(sys.stdin.buffer.read().decode("utf-8-sig"), "standard input")}]
        except UnicodeDecodeError as e:
            raise UserError(f"standard input: expected UTF-8 text; invalid byte at {e.start}") from None
    if document is not None:
        return [{"document": check_document(document, "--document")}]
    if data.suffix.lower() == ".pdf":
        return [{"document": check_document(read_pdf(data, MAX_CHARS), data)}]
    if data.suffix.lower() != ".jsonl" and str(data) != "-":
        return [{"document": check_document(read_text(data), data)}]
    if out is None:
        raise UserError("--out is missing; expected a .jsonl file for the results of --data, or - to print them")
    if str(out) != "-" and (out.is_dir() or out.resolve() == data.resolve()):
        raise UserError(f"--out {out}: expected a file of its own")
    rows = read_rows(data, DocumentRow)
    for i, row in enumerate(rows, 1):
        check_document(row["document"], f"{data}: row {i}")
    return rows


def warn(model_dir: str, schema) -> None:
    """Say on standard error where a model was trained for no documents, or for another schema."""
    if not (Path(model_dir) / "adapter_config.json").is_file():
        print(f"warning: {model_dir}: no adapter: valid JSON of the schema need not be right", file=sys.stderr)
    if warning := schema_warning(model_dir, schema):
        print(f"warning: {warning}", file=sys.stderr)


def result(extraction: Extraction, document: str, schema, with_details: bool, sure: Callable | None) -> dict:
    """{"output"[, "details"]} of one document, or {"error"}. sure(extraction): the confidence of each leaf."""
    if isinstance(extraction.value, UserError):
        return {"error": str(extraction.value)}
    found = {"output": extraction.value}
    if with_details:
        found["details"] = details(extraction.value, document, schema, sure(extraction) if sure else None)
    return found


def shown(found: dict) -> str:
    """One result as printed: its JSON; with details, both, and a line for each value."""
    output = json.dumps(found["output"], ensure_ascii=False, indent=1)
    if "details" not in found:
        return output
    lines = ",\n".join(f"  {json.dumps(leaf, ensure_ascii=False)}" for leaf in found["details"])
    return f'{{"output": {output},\n "details": [\n{lines}\n]}}'


def result_keys(
    model_dir: str, schema, max_new_tokens: int, documents: list[str], with_details: bool = False
) -> list[str]:
    """A hash for each result of all that determines it: model, adapter weights, schema, token budget, document."""
    about = [model_dir, adapter_sha256(model_dir), schema, max_new_tokens, *["details"] * with_details]
    return [row_hash(compact([*about, d])) for d in documents]


def write_results(
    answer: Callable[[list[str], int], list[dict]], rows: list[dict], keys: list[str], step: int, out: Path
) -> None:
    """Write one line per row to `out`, or print it (-); a stopped run resumes from what is finished in <out>.part.

    answer(documents, number of the first): results of at most `step` documents.
    Error: UserError, after the last document, if any has an "error" in place of an "output". Errors are final: a
    resumed run does not try those documents again.
    """
    part = None if str(out) == "-" else ResumableJsonl(out.with_name(out.name + ".part"))
    done = part.rows if part else []
    if [r.get("key") for r in done] != keys[: len(done)]:
        part.truncate(0)  # results of another model, schema or input
    for at in tqdm(range(len(done), len(rows), step), desc="documents", unit=f"{step}"):
        batch = [r["document"] for r in rows[at : at + step]]
        found = [{"line": i + 1, "key": keys[i], **own} for i, own in enumerate(answer(batch, at + 1), at)]
        if part:
            part.append(*found)
        else:
            done += found
            for line in whole(rows[at : at + step], found):
                print(json.dumps(line, ensure_ascii=False), flush=True)
    if part:
        write_jsonl(out, whole(rows, done))
        part.path.unlink(missing_ok=True)
    failed = [r for r in done if "error" in r]
    if failed:
        raise UserError(
            f"{out}: {len(failed)} of {len(done)} documents have an error in place of a result, the first in "
            f"line {failed[0]['line']}: {failed[0]['error']}"
        )
    print(f"{out}: {len(done)} results, all valid", file=sys.stdout if part else sys.stderr)


def whole(rows: list[dict], results: list[dict]) -> Iterator[dict]:
    """Each result after the fields of its row."""
    for row, found in zip(rows, results, strict=True):
        yield {k: v for k, v in row.items() if k not in OWN} | {k: v for k, v in found.items() if k != "key"}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--model_dir", help="adapter folder, model folder, hub id or smollm2-135m")
    where.add_argument("--endpoint", help="http://host:port/v1 of llama.cpp, Ollama or vLLM in place of a model here")
    p.add_argument("--endpoint_model", help="the model's name there (default: the first that the server lists)")
    p.add_argument("--schema", required=True, type=Path, help="JSON Schema (draft 2020-12) of the result")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--document", help="the document's text, or - for standard input")
    source.add_argument(
        "--data", "--input", type=Path, help='a text file; or rows {"document", ...}, .jsonl or -, with --out'
    )
    p.add_argument("--out", "--output", type=Path, help="JSONL of the results, - to print it; a stopped run is resumed")
    p.add_argument(
        "--details", action="store_true", help="confidence of each value and whether the document has it (grounded)"
    )
    p.add_argument("--max_new_tokens", type=positive(int), default=512, help="token budget of an answer (default 512)")
    p.add_argument(
        "--batch_size", type=positive(int), default=8, help="documents per batch (default 8): memory against time"
    )
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    p.add_argument("--lenient", action="store_true", help="accept keywords that cannot be enforced; validate, retry")
    cli(main, p)
