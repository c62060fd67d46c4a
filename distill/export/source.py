"""What is exported: a model or an adapter with its base, its task, and the prompts of the proof."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import create_model
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from common import SEED, Calibration, Task, holdout, row_hash, unit_hash
from distill.evaluate import trained_rows
from distill.files import ROOT, FilledText, StrictModel, UserError, read_json, read_rows
from distill.model.hub import adapter_sha256, base_config, base_record, check_adapter
from distill.tasks.codegen_tasks import code_prompt
from distill.tasks.idp_corpus import DocumentRow
from distill.tasks.idp_documents import idp_prompt
from distill.tasks.idp_schema import check_schema
from distill.tasks.label_rows import COLUMNS, read_fields, read_label_rows


@dataclass(frozen=True)
class Source:
    """A model to export.

    model_dir: as the user gave it; adapter: whether it is one. base: its record for export.json (name, revision,
    hashes); base_bytes: of its weights. task, calibration: of a label model, else None; schema: of an IDP model's
    answers, else None.
    """

    model_dir: str
    adapter: bool
    adapter_sha256: str | None
    base: dict
    base_bytes: int
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task | None
    calibration: Calibration | None
    schema: dict | None

    @classmethod
    def of(cls, model_dir: str, schema_path: Path | None) -> "Source":
        """Look at a model without loading its weights.

        Error: UserError for what is not there or cannot be merged: a base of 4 bits, or an adapter that changes more
        than matrices.
        """
        schema = read_json(schema_path) if schema_path else None
        if schema:
            check_schema(schema, lenient=True)
        adapter = (Path(model_dir) / "adapter_config.json").is_file()
        name = check_adapter(model_dir) if adapter else model_dir
        if adapter:
            check_mergeable(Path(model_dir))
        path, config, tokenizer = base_config(name)
        if getattr(config, "quantization_config", None):
            raise UserError(f"{name}: its weights are quantised; expected the 16-bit model that it was made from")
        files = weight_files(path)
        base = {"name": str(name), **base_record(name, path, config, tokenizer)}
        base["sha256"] = {file.name: whole_sha256(file) for file in files}
        size = sum(file.stat().st_size for file in files)
        own = Path(model_dir) / "task.json"
        task = Task.load(own) if own.is_file() else None
        calibration = Calibration.load(model_dir, task) if task else None
        sha256 = adapter_sha256(model_dir)
        return cls(model_dir, adapter, sha256, base, size, config, tokenizer, task, calibration, schema)

    def prompts(self, data: Path | None, rows: int) -> tuple[list[str], str]:
        """(at most `rows` user messages for the proof, where they are from).

        Those of `data`, else of what ships for the task and was held out; rows that the model was trained on only
        where there are no others.
        """
        texts, source = self.rows_of(data) if data else self.shipped_rows()
        trained = trained_rows(self.model_dir) or set()
        unseen = [text for text in dict.fromkeys(texts) if row_hash(text) not in trained] or texts
        return sorted(unseen, key=lambda text: unit_hash(SEED, text))[:rows], source

    def rows_of(self, data: Path) -> tuple[list[str], str]:
        """User messages of the rows of `data`: the inputs of a label task, documents, or whole prompts.

        A label task reads them as evaluation does, from CSV, JSON or JSONL by its own columns; labels are not needed.
        Error: UserError for a file without such rows.
        """
        finished = ("input", "prompt")
        if self.task:
            column = (self.task.columns or COLUMNS)["text"]
            fields = read_fields(data, [])[0][1]
            if column in fields or not any(name in fields for name in finished):
                task = replace(self.task, columns={"text": column} if self.task.columns else {})
                return [self.task.prompt(row["question"]) for row in read_label_rows(data, task)[0]], str(data)
        rows = read_rows(data, StrictModel)
        field = next((name for name in ("question", "document", *finished) if name in rows[0]), None)
        if field is None:
            raise UserError(f"{data}: row 1: expected a field 'question', 'document', 'input' or 'prompt'")
        model = create_model("ProofRow", __base__=StrictModel, **{field: (FilledText, ...)})
        texts = [row[field] for row in read_rows(data, model)]
        if field == "document" and self.schema:
            texts = [idp_prompt(self.schema, text) for text in texts]
        return texts, str(data)

    def shipped_rows(self) -> tuple[list[str], str]:
        if self.task:
            shipped = ROOT / "data" / f"{self.task.name}_dataset.json"
            if not shipped.is_file():
                return self.task.null_prompts(), "the task's content-free inputs; --data takes real rows"
            rows = holdout(read_label_rows(shipped, self.task)[0])[1]
            return [self.task.prompt(row["question"]) for row in rows], f"held-out rows of data/{shipped.name}"
        if self.schema:
            rows = read_rows(ROOT / "data" / "idp_corpus.jsonl", DocumentRow)
            texts = [idp_prompt(self.schema, row["document"]) for row in holdout(rows)[1]]
            return texts, "held-out documents of data/idp_corpus.jsonl"
        rows = read_rows(ROOT / "data" / "codegen_tasks.jsonl", StrictModel)
        return [code_prompt(row["prompt"]) for row in rows], "requests of data/codegen_tasks.jsonl"

    def answer_schema(self) -> dict | None:
        """The JSON Schema under which llama.cpp is tried: the model's own, or that of one label."""
        if self.schema or not self.task:
            return self.schema
        label = {"type": "object", "properties": {"label": {"enum": list(self.task.labels)}}}
        return {**label, "required": ["label"], "additionalProperties": False}


def check_mergeable(folder: Path) -> None:
    """UserError, by field, for an adapter that merging into the matrices does not cover; DoRA and biases are merged."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    odd = [f for f in ("modules_to_save", "trainable_token_indices", "target_parameters") if config.get(f)]
    odd += ["peft_type"] * (config.get("peft_type") != "LORA")
    if odd:
        raise UserError(f"{path}: field '{odd[0]}': cannot be merged; expected LoRA on the model's linear layers")


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors of a model folder, or of a hub model in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        folder = Path(cached_file(path, "config.json")).parent
    return sorted(folder.glob("*.safetensors"))


def whole_sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
