"""What answers the KD rows that have no answer: gradient boosting, a model, or an OpenAI-compatible endpoint.

kd_train.py calls check_teacher, then teach. Answers are stored beside the data, in NAME_kd.teacher/ for NAME_kd.jsonl,
so a killed run asks only for the rest. A local teacher is freed before the student's weights load. The log-probs of a
teacher: distill/train/teacher_topk.py.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Calibration, LabelScorer, Task, label_classes, load_model, prompt_ids
from distill.files import ResumableJsonl, UserError, sha256
from distill.model.hub import adapter_base, base_config
from distill.train.teacher_endpoint import Endpoint, ask_endpoint

BOOSTING = "gradient-boosting"
LABEL_TOKENS = 64  # per answer of a label task: a label and the words that some teachers put around it


@dataclass(frozen=True)
class Teacher:
    """A teacher. name: gradient-boosting, a model's folder or hub id, or the endpoint's address.

    precision: of a local model (nf4, bf16, fp32 or auto). endpoint: None for a local teacher.
    """

    name: str
    precision: str = "auto"
    endpoint: Endpoint | None = None

    @property
    def is_local_model(self) -> bool:
        return self.endpoint is None and self.name != BOOSTING

    def identity(self) -> list:
        """What stored answers depend on: the name and, for a folder, its files, so that a retrained model is new."""
        if self.endpoint:
            return [self.endpoint.url, self.endpoint.model]
        from huggingface_hub import try_to_load_from_cache

        names, state = [self.name], []
        if (Path(self.name) / "adapter_config.json").is_file():
            names.append(adapter_base(self.name))
        for name in names:
            if Path(name).is_dir():
                files = sorted(p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
                state += [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
            else:
                state.append(try_to_load_from_cache(name, "config.json"))  # a hub id: its path has the commit
        return [names, self.precision, state]


def learns_token_distribution(teacher: Teacher | None, task: Task | None) -> bool:
    """Whether the loss is on the teacher's token distributions: free text, and a teacher whose logits are at hand."""
    return task is None and teacher is not None and teacher.is_local_model


def check_teacher(teacher: Teacher, student: str, task: Task | None) -> None:
    """Raise UserError for a teacher that cannot work, before anything loads or is asked."""
    if teacher.endpoint:
        teacher.endpoint.check()
    elif teacher.name == BOOSTING and task is None:
        raise UserError(f"--teacher {BOOSTING}: free text has no classes; expected a label task (--task)")
    elif learns_token_distribution(teacher, task):
        shared_vocabulary(teacher.name, student)


def shared_vocabulary(teacher: str, student: str) -> int:
    """How many token ids both models have. Loads no weights.

    Two vocabularies may differ only by padding rows: Qwen2.5 has 151,936 rows of logits up to 3B and 152,064 from 7B
    on, for the same 151,665 tokens.

    Raises UserError for any other difference.
    """
    names = [adapter_base(n) if (Path(n) / "adapter_config.json").is_file() else n for n in (teacher, student)]
    (_, config_t, tokenizer_t), (_, config_s, tokenizer_s) = map(base_config, names)
    one, other = tokenizer_t.get_vocab(), tokenizer_s.get_vocab()
    differ = sorted(t for t in one.keys() | other.keys() if one.get(t) != other.get(t))
    if differ:
        found = f"{len(differ)} tokens differ, for example {differ[0]!r}"
        raise UserError(
            f"{teacher}: its vocabulary is not that of {student} ({found}); expected one of the same family"
        )
    size = min(c.get_text_config().vocab_size for c in (config_t, config_s))
    if size <= max(one.values()):
        raise UserError(f"{teacher}, {student}: {size} rows of logits; expected one for each of {len(one)} tokens")
    return size


def cache_folder(data: Path) -> Path:
    """Where a teacher's answers and log-probs for the rows of `data` are stored."""
    return data.with_name(f"{data.stem}.teacher")


def require_single_process(teacher: Teacher) -> None:
    """Raise UserError under `accelerate launch`, where each process would ask the teacher for everything."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"--teacher {teacher.name}: expected one process for the teacher; run once without `accelerate launch`"
        )


def release_memory() -> None:
    """Return the memory of a model that the caller has deleted to the device."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def teach(
    teacher: Teacher, rows: list[dict], task: Task | None, tokenizer, *, data: Path, max_len: int, seed: int
) -> tuple[list[dict], dict[str, int]]:
    """Fill in teacher_output where it is missing: (rows to train on, {reason: rows dropped}).

    For a label task, gradient boosting and local models also give teacher_probs; an endpoint gives a label. For free
    text the teacher writes the answer. Rows whose prompt exceeds max_len tokens are not asked for.

    Raises UserError when no row is left.
    """
    untaught = [r for r in rows if not r.get("teacher_output")]
    if not untaught:
        if not learns_token_distribution(teacher, task):
            print(f"every row has its teacher_output: --teacher {teacher.name} is not asked")
        return rows, {}
    dropped = {}
    if task and not teacher.endpoint:
        probs = boosted(untaught, task, data, seed) if teacher.name == BOOSTING else scored(teacher, untaught, task)
        for row, p in zip(untaught, probs, strict=True):
            row["teacher_probs"] = dict(zip(task.labels, map(float, p), strict=True))
            row["teacher_output"] = task.labels[int(np.argmax(p))]
    else:
        dropped = answered(teacher, untaught, task, tokenizer, data, max_len)
    taught = [r for r in rows if r.get("teacher_output")]
    given = len(untaught) - sum(dropped.values())
    print(f"{teacher.name} taught {given} rows" + "".join(f"; {n} {why}" for why, n in dropped.items()))
    if not taught:
        raise UserError(f"{data}: no row has an answer to train on: {dropped} of {len(rows)} rows")
    return taught, dropped


def boosted(rows: list[dict], task: Task, data: Path, seed: int) -> np.ndarray:
    """[N, L] probabilities by gradient boosting on the fields in the prompts, out of fold by customer."""
    from distill.tasks.boosting import out_of_fold
    from distill.tasks.creditmix import customer

    before, after = task.template.split("{input}")
    if not all(r.get("output") for r in rows):
        raise UserError(f"{data}: --teacher gradient-boosting learns from field 'output'; a row has none")
    label_classes(data, rows, "output", task)
    texts = [r["input"].removeprefix(before).removesuffix(after) for r in rows]
    fields = [
        {"question": text, "answer": row["output"], "group": row.get("group") or customer(text)}
        for row, text in zip(rows, texts, strict=True)
    ]
    return out_of_fold(fields, task.labels, seed)  # no row is taught by a model that saw its customer


def scored(teacher: Teacher, rows: list[dict], task: Task) -> np.ndarray:
    """[N, L] probabilities by a local model through the label scorer, with the calibration in its folder."""
    model, tokenizer = load_model(teacher.name, teacher.precision)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    raw = scorer.score([r["input"] for r in rows], progress=True)
    scores = Calibration.load(teacher.name, task)(raw, scorer.prior(task))
    del model, scorer
    release_memory()
    return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def answered(
    teacher: Teacher, rows: list[dict], task: Task | None, tokenizer, data: Path, max_len: int
) -> dict[str, int]:
    """Set teacher_output from the teacher's text where that can be trained on; returns {reason: rows without one}."""
    max_tokens = LABEL_TOKENS if task else max_len
    lengths = map(len, prompt_ids(tokenizer, [r["input"] for r in rows]))
    fits = [r for r, n in zip(rows, lengths, strict=True) if n < max_len]
    dropped = {f"longer than {max_len} tokens": len(rows) - len(fits)}
    name = sha256(json.dumps([teacher.identity(), max_tokens]))[:16]
    answers = ResumableJsonl(cache_folder(data) / f"answers-{name}.jsonl")
    known = {answer["prompt"] for answer in answers.rows}
    todo = list(dict.fromkeys(r["input"] for r in fits if r["input"] not in known))
    print(f"{teacher.name}: {len(fits)} rows need an answer, {len(todo)} of them are not in {answers.path}")

    def keep(prompt: str, text: str, whole: bool) -> None:
        text = text.encode("utf-8", "replace").decode()  # half a character (a lone surrogate) is no text
        answers.append({"prompt": prompt, "text": text, "whole": whole})

    if todo:
        require_single_process(teacher)
        if teacher.endpoint:
            ask_endpoint(teacher.endpoint, todo, max_tokens, keep)
        else:
            generate(teacher, todo, max_tokens, keep)
    answer_to = {answer["prompt"]: (answer["text"], answer["whole"]) for answer in answers.rows}
    useless = []
    for row in fits:
        text, whole = answer_to[row["input"]]
        if task:
            row["teacher_output"] = label_of(text, task.labels)
        elif whole and text.strip():  # a text that was cut would teach the student to stop in mid-sentence
            row["teacher_output"] = text
        if not row.get("teacher_output"):
            useless.append(text)
    if useless:
        why = "answers that are no label" if task else "answers that are empty or longer than --max_len"
        print(f"{len(useless)} {why}, kept in {answers.path}; for example {useless[0][:60]!r}")
        dropped[why] = len(useless)
    return {why: n for why, n in dropped.items() if n}


def label_of(text: str, labels: tuple[str, ...]) -> str | None:
    """The label that an answer states, or None where that is not certain.

    Case, punctuation and a preamble such as "Answer:" are ignored. A label inside a sentence does not count: "not Bad"
    would teach the opposite.
    """
    for part in (text, text.rpartition(":")[2]):
        if part.strip() in labels:
            return part.strip()
        bare = part.strip(" \t\r\n*_`\"'.!()[]").casefold()
        found = [label for label in labels if label.casefold() == bare]
        if len(found) == 1:
            return found[0]
    return None


def generate(teacher: Teacher, prompts: list[str], max_tokens: int, keep: Callable[[str, str, bool], None]) -> None:
    """Greedy answers of a local model: keep(prompt, text, whole). Prompt and answer share `max_tokens`."""
    from tqdm import tqdm

    from distill.tasks.codegen_samples import reply_to

    model, tokenizer = load_model(teacher.name, teacher.precision)
    lengths = {p: len(ids) for p, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True)}
    prompts = sorted(prompts, key=lengths.__getitem__)  # a batch has prompts of similar length
    bar = tqdm(total=len(prompts), desc="teacher", unit="answer", file=sys.stderr)
    for i in range(0, len(prompts), 16):
        batch = prompts[i : i + 16]
        most = max(1, min(max_tokens, model.config.get_text_config().max_position_embeddings) - lengths[batch[-1]])
        for prompt, (text, tokens) in zip(batch, reply_to(model, tokenizer, batch, most, 0), strict=True):
            keep(prompt, text, tokens < most)
        bar.update(len(batch))
    bar.close()
    del model
    release_memory()
