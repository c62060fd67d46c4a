"""Take a trained model with you: a merged folder, GGUF files, an Ollama Modelfile, and the proof that nothing changed.

    python export_model.py --model_dir runs/smollm2_sft --out exports/sft
    python export_model.py --model_dir runs/smollm2_sft --out exports/sft --gguf f16 q8_0 q4_1 --overwrite
    python export_model.py --model_dir runs/idp_sft --schema data/idp_schema.json --out exports/idp

The folder loads in transformers, vLLM and our own scripts (--model_dir exports/sft), the GGUF files in llama.cpp and
Ollama. The adapter is merged in fp32 and rounded once, to the base's own 16 bits. Every check is printed; when one
fails, the exit code is 1 and nothing is written. GGUF files are checked in a real llama.cpp where
requirements-export.txt is installed. All of it runs on the CPU.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common import load_base, load_model, prompt_ids
from distill.export.gguf_file import BITS, check_model, check_types, mixes, write_gguf
from distill.export.llama_cpp import EngineError, LlamaCpp, installed
from distill.export.pages import card, modelfile
from distill.export.parity import (
    TEXTS,
    Answers,
    Proof,
    ProofFailed,
    answers_of,
    bars,
    check_json,
    check_merge,
    check_prompts,
    check_rounded,
    check_text,
    label_parity,
    shown,
)
from distill.export.source import Source
from distill.files import UserError, atomic_write, check_output_folder, cli, positive, read_json, write_json
from distill.model.chat_template import dated
from distill.run_record import run_record
from distill.tasks.idp_documents import INSTRUCTION

TRAVELS = ("task.json", "calibration.json", "train_rows.txt")  # from the adapter's folder, for our own scripts
LABEL_TOKENS, TEXT_TOKENS, JSON_TOKENS = 16, 48, 512  # of the greedy texts that are compared, and of JSON answers
WEIGHTS = (".safetensors", ".gguf")


def main(args):
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # fp32 weights of a 3B do not fit where its training did
    kinds = list(dict.fromkeys(args.gguf))
    check_types(kinds)
    source = Source.of(args.model_dir, args.schema)
    if kinds:
        check_model(source.config, source.tokenizer, args.model_dir)
    prompts, rows = source.prompts(args.data, args.rows)
    proof = Proof()
    try:
        with building(args.out, args.overwrite, source.base_bytes, kinds) as folder:
            merged = merge(source, folder, prompts, proof)
            for name in TRAVELS:
                if (Path(args.model_dir) / name).is_file():
                    shutil.copy(Path(args.model_dir) / name, folder / name)
            model, tokenizer = load_base(str(folder), "fp32")
            ours = answers_of(model, tokenizer, prompts, source.task, new_tokens(source))
            check_rounded(proof, merged, ours, source.calibration)
            del model  # its memory is llama.cpp's now
            for kind in kinds:
                export_gguf(folder / f"{args.out.name}-{kind}.gguf", kind, source, tokenizer, prompts, ours, proof)
            write_pages(folder, args.out, kinds, source, tokenizer)
            record = {
                "model_dir": str(args.model_dir),
                "adapter_sha256": source.adapter_sha256,
                "base": source.base,
                "dtype": str(source.config.dtype).removeprefix("torch."),
                "task": source.task.name if source.task else None,
                "sizes": {f.name: f.stat().st_size for f in sorted(folder.iterdir()) if f.suffix in WEIGHTS},
                "rows": {"count": len(prompts), "source": rows},
                "checks": proof.checks,
                "commands": commands(args.out, kinds, source),
                **run_record(args),
            }
            write_json(folder / "export.json", record)
            with atomic_write(folder / "README.md") as f:
                f.write(card(record, args.out.name))
    except (ProofFailed, EngineError) as e:
        print(f"failed, and nothing was exported: {e}", file=sys.stderr)
        sys.exit(1)
    print(f"{args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")


def new_tokens(source: Source) -> int:
    return LABEL_TOKENS if source.task else TEXT_TOKENS


@contextmanager
def building(out: Path, overwrite: bool, base_bytes: int, kinds: list[str]) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, whole or not at all.

    Error: UserError where `out` holds something, or the disk has no room for a folder of base_bytes and its GGUFs.
    """
    check_output_folder("--out", out)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"--out {out}: not empty; expected another folder, or --overwrite")
        if not (out / "export.json").is_file():
            raise UserError(f"--out {out}: not an export, so it is not overwritten; expected another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = base_bytes * (1 + sum(BITS[kind] for kind in kinds) / 16)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(f"--out {out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old.tmp"))
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def merge(source: Source, folder: Path, prompts: list[str], proof: Proof) -> Answers:
    """Write the merged model to `folder`; its answers in fp32, before it is rounded, to compare with."""
    model, tokenizer = load_model(source.model_dir, "fp32")
    if source.adapter:
        adapter = answers_of(model, tokenizer, prompts, source.task, new_tokens(source), rows=TEXTS)
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as e:  # the merged weights hold NaN
            raise UserError(f"{source.model_dir}: {e}") from None
    merged = answers_of(model, tokenizer, prompts, source.task, new_tokens(source))
    if source.adapter:
        check_merge(proof, adapter, merged, source.calibration)
    model.to(source.config.dtype).save_pretrained(folder)
    tokenizer.chat_template = dated(tokenizer.get_chat_template())  # engines would print today's date
    tokenizer.save_pretrained(folder)
    return merged


def export_gguf(
    file: Path,
    kind: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    ours: Answers,
    proof: Proof,
) -> None:
    """Write one GGUF file and prove it, for labels in the smallest of its mixes that reaches the bars.

    Without llama.cpp it is the most faithful mix, unproven. Error: ProofFailed where no mix reaches them.
    """
    choices = mixes(kind)
    if not installed():
        write_gguf(file.parent, tokenizer, file, kind, file.stem, choices[-1])
        return proof.record(file.name, None, "llama.cpp is not installed: pip install -r requirements-export.txt")
    context = max(map(len, prompt_ids(tokenizer, prompts))) + JSON_TOKENS + 16
    for mix in choices:
        write_gguf(file.parent, tokenizer, file, kind, file.stem, mix)
        with LlamaCpp(file, context) as engine:
            if mix is choices[0]:
                check_prompts(proof, engine, tokenizer, prompts, file.name)
                if BITS[kind] == 16:
                    check_text(proof, engine, tokenizer, prompts, ours, file.name)
            passed = True
            if source.task:
                passed, figures = label_parity(engine, tokenizer, prompts, ours, source.task, source.calibration, kind)
                found = "; ".join([shown(figures), *(f"{tensor} in {bits}" for tensor, bits in mix.items())])
                if not passed and mix is choices[-1]:
                    found += f"; {bars(kind)}: export without {kind}, or with more bits"
                if passed or mix is choices[-1]:
                    proof.record(f"{file.name}: labels", passed, found, **figures, mix=mix)
                else:
                    print(f"not enough: {file.name}: {found}", flush=True)
            if passed and (schema := source.answer_schema()):
                check_json(proof, engine, prompts, schema, JSON_TOKENS, file.name)
        if passed:
            return None


# ---------------------------------------------------------------------------------------------------------------------
# What lies beside the weights


def write_pages(folder: Path, out: Path, kinds: list[str], source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """The Modelfile where there is a GGUF file, and the schema as format.json."""
    if source.schema:
        write_json(folder / "format.json", source.schema)
    if not kinds:
        return
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = sorted({tokenizer.decode(i) for i in (ends if isinstance(ends, list) else [ends])})
    instruction = source.task.template if source.task else INSTRUCTION if source.schema else ""
    exact = bool(source.task or source.schema)
    with atomic_write(folder / "Modelfile") as f:
        f.write(modelfile(tokenizer, f"{out.name}-{kinds[0]}.gguf", ends, exact, instruction.splitlines()))


def commands(out: Path, kinds: list[str], source: Source) -> dict[str, str]:
    """How the export is used, by engine."""
    script = "infer_creditmix.py" if source.task else "infer_idp.py" if source.schema else "infer_codegen.py"
    found = {"here": f"python {script} --model_dir {out}", "vLLM": f"vllm serve {out}"}
    if kinds:
        found["llama.cpp"] = f"llama-server -m {out}/{out.name}-{kinds[0]}.gguf --port 8080"
        found["Ollama"] = f"ollama create {out.name} -f {out}/Modelfile && ollama run {out.name}"
    if source.schema:
        form = f'"format": \'"$(cat {out}/format.json)"\''
        body = f'{{"model": "{out.name}", "stream": false, "messages": [{{"role": "user", "content": "..."}}], {form}}}'
        found["Ollama, JSON"] = f"curl http://localhost:11434/api/chat -d '{body}'"
    return found


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", required=True, help="adapter folder, model folder, hub id or smollm2-135m")
    p.add_argument("--out", required=True, type=Path, help="folder to write; it appears whole or not at all")
    p.add_argument("--gguf", nargs="*", default=["q8_0"], help="GGUF files to write (default q8_0; none: no file)")
    p.add_argument("--data", type=Path, help="rows of the proof (default: held-out rows that ship with the task)")
    p.add_argument("--rows", type=positive(int), default=200, help="how many of them at most (default 200)")
    p.add_argument("--schema", type=Path, help="JSON Schema of an IDP model's answers")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    cli(main, p)
