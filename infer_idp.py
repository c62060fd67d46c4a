"""IDP: documents to JSON that validates against a schema, every time.

    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --document "INVOICE 17 ..."
    python infer_idp.py --model_dir runs/idp_sft --schema data/idp_schema.json --data docs.jsonl --out out.jsonl

With a server that holds the model (llama.cpp, Ollama, vLLM):

    python infer_idp.py --endpoint http://127.0.0.1:8080/v1 --schema data/idp_schema.json --document "INVOICE 17 ..."

On a CPU, with the embedded student untrained:

    python infer_idp.py --model_dir smollm2-135m --schema data/sroie_schema.json --document "ACME LTD  TOTAL 5.00"

A result is printed only after it has passed Draft202012Validator, formats included. A document longer than the model's
context is read in overlapping pieces, whose results are merged (distill/tasks/idp_documents.py).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from common import load_model, row_hash
from distill.files import ResumableJsonl, UserError, cli, positive, read_json, read_rows, read_text, write_jsonl
from distill.model.hub import adapter_sha256
from distill.tasks.endpoint import Endpoint
from distill.tasks.idp_corpus import DocumentRow
from distill.tasks.idp_decode import Constraint, Vocabulary
from distill.tasks.idp_documents import check_document, extract, extract_from
from distill.tasks.idp_schema import check_schema, compact

BATCHES = 4  # batches per write of the results; a stopped run loses at most these


def main(args):
    try:
        schema = read_json(args.schema)
        grammar = check_schema(schema, args.lenient or bool(args.endpoint))
    except RecursionError:
        raise UserError(f"{args.schema}: nested too deep to be read") from None
    documents = read_documents(args.document, args.data, args.out)
    if args.endpoint:
        endpoint = Endpoint(args.endpoint, args.endpoint_model)
        name = f"{endpoint.url} {endpoint.model}"

        def extract_batch(batch, first=1):
            return extract_from(endpoint, batch, schema, args.max_new_tokens, args.batch_size, first)
    else:
        name, (model, tokenizer) = args.model_dir, load_model(args.model_dir, args.precision)
        vocab = Vocabulary.of(tokenizer, model.config.get_text_config().vocab_size)
        constraint = Constraint.of(grammar, vocab, args.max_new_tokens)

        def extract_batch(batch, first=1):
            return extract(model, tokenizer, batch, schema, constraint, args.max_new_tokens, args.batch_size, first)

    if args.out:
        keys = result_keys(name, schema, args.max_new_tokens, documents)
        write_results(extract_batch, documents, keys, args.batch_size * BATCHES, args.out)
    else:
        (value,) = extract_batch(documents)
        if isinstance(value, UserError):
            raise value
        print(json.dumps(value, ensure_ascii=False, indent=1))


def read_documents(document: str | None, data: Path | None, out: Path | None) -> list[str]:
    """The documents from --document (text, or - for standard input) or --data (.jsonl rows, or else one text file)."""
    if document == "-":
        try:
            return [check_document(sys.stdin.buffer.read().decode("utf-8-sig"), "standard input")]
        except UnicodeDecodeError as e:
            raise UserError(f"standard input: expected UTF-8 text; invalid byte at {e.start}") from None
    if document is not None:
        return [check_document(document, "--document")]
    if data.suffix.lower() != ".jsonl":
        return [check_document(read_text(data), data)]
    if out is None:
        raise UserError("--out is missing; expected a .jsonl file for the results of --data")
    if out.is_dir() or out.resolve() == data.resolve():
        raise UserError(f"--out {out}: expected a file of its own")
    rows = read_rows(data, DocumentRow)
    return [check_document(r["document"], f"{data}: row {i}") for i, r in enumerate(rows, 1)]


def result_keys(model_dir: str, schema, max_new_tokens: int, documents: list[str]) -> list[str]:
    """A hash for each result of all that determines it: model, adapter weights, schema, token budget, document."""
    about = [model_dir, adapter_sha256(model_dir), schema, max_new_tokens]
    return [row_hash(compact([*about, d])) for d in documents]


def write_results(
    extract_batch: Callable[[list[str], int], list], documents: list[str], keys: list[str], step: int, out: Path
) -> None:
    """Write one result per line to `out`; a stopped run resumes from the finished results in <out>.part.

    extract_batch(documents, number of the first): results of at most `step` documents.
    Error: UserError, after the last document, if any has an "error" in place of an "output". Errors are final: a
    resumed run does not try those documents again.
    """
    part = ResumableJsonl(out.with_name(out.name + ".part"))
    done = part.rows
    if [r.get("key") for r in done] != keys[: len(done)]:
        part.truncate(0)  # results of another model, schema or input
    for at in tqdm(range(len(done), len(documents), step), desc="documents", unit=f"{step}"):
        batch = documents[at : at + step]
        values = extract_batch(batch, at + 1)
        found = [{"error": str(v)} if isinstance(v, UserError) else {"output": v} for v in values]
        part.append(*({"line": i + 1, "key": keys[i], **row} for i, row in enumerate(found, at)))
    write_jsonl(out, [{k: v for k, v in r.items() if k != "key"} for r in done])
    part.path.unlink(missing_ok=True)
    failed = [r for r in done if "error" in r]
    if failed:
        raise UserError(
            f"{out}: {len(failed)} of {len(done)} documents have an error in place of a result, the first in "
            f"line {failed[0]['line']}: {failed[0]['error']}"
        )
    print(f"{out}: {len(done)} results, all valid")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--model_dir", help="adapter folder, model folder, hub id or smollm2-135m")
    where.add_argument("--endpoint", help="http://host:port/v1 of llama.cpp, Ollama or vLLM in place of a model here")
    p.add_argument("--endpoint_model", help="the model's name there (default: the first that the server lists)")
    p.add_argument("--schema", required=True, type=Path, help="JSON Schema (draft 2020-12) of the result")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--document", help="the document's text, or - for standard input")
    source.add_argument("--data", "--input", type=Path, help='a text file, or .jsonl with rows {"document"} and --out')
    p.add_argument(
        "--out", "--output", type=Path, help="results of a .jsonl; a stopped run is resumed (default: print)"
    )
    p.add_argument("--max_new_tokens", type=int, default=512, help="token budget of an answer (default 512)")
    p.add_argument(
        "--batch_size", type=positive(int), default=8, help="documents per batch (default 8): memory against time"
    )
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    p.add_argument("--lenient", action="store_true", help="accept keywords that cannot be enforced; validate, retry")
    cli(main, p)
