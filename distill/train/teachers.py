"""What answers the KD rows that have no answer: gradient boosting, a model, or an OpenAI-compatible endpoint.

kd_train.py calls check_teacher, then teach. Answers are stored beside the data, in NAME_kd.teacher/ for NAME_kd.jsonl,
so a killed run asks only for the rest. A local teacher is freed before the student's weights load. The log-probs of a
teacher: distill/train/teacher_topk.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate.utils.memory import clear_device_cache

from common import Calibration, LabelScorer, Task, label_classes, load_model, prompt_ids
from distill.files import UserError, positive, sha256
from distill.model.hub import adapter_base, base_config
from distill.train.teacher_answers import StoredAnswers, use_answers
from distill.train.teacher_apis import APIS, LABEL_TOKENS, Answer, input_text
from distill.train.teacher_batch import read_batch, write_batch
from distill.train.teacher_endpoint import Endpoint, announce_cost, ask_endpoint, usage_of

BOOSTING = "gradient-boosting"


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a teacher that answers rows without teacher_output."""
    add = parser.add_argument
    add("--teacher", help="model, adapter, gradient-boosting or http://host/v1, see above")
    add("--teacher_model", help="the model's name at an http teacher; its key: OPENAI_API_KEY")
    add("--teacher_timeout", type=positive(float), default=120.0, help="seconds per answer (default: 120)")
    add("--teacher_api", choices=APIS, default="chat", help="of an http teacher; all but chat give label probabilities")
    add("--price_in", type=positive(float), help="price of a million tokens of prompts, at an http teacher")
    add("--price_out", type=positive(float), help="price of a million tokens of answers")
    add("--max_cost", type=positive(float), help="ask no more when the answers of these rows have cost so much")
    add(
        "--generate", type=positive(int), metavar="N", help="have an http teacher write N inputs for --task into --data"
    )
    add("--examples", type=Path, help="what they are like: at least five rows, with or without labels")
    add("--exclude", nargs="+", default=[], help="rows to evaluate on: an input that is like one of them is dropped")
    add("--yes", action="store_true", help="use the inputs without asking whether they are good")
    add("--batch_out", type=Path, help="write the requests to a file for the OpenAI Batch API, and stop")
    add("--batch_in", nargs="+", help="read the results of the Batch API instead of asking")


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
        teacher.endpoint.check(task)
    elif teacher.name == BOOSTING and task is None:
        raise UserError(f"--teacher {BOOSTING}: free text has no classes; expected a label task (--task)")
    elif learns_token_distribution(teacher, task):
        shared_vocabulary(teacher.name, student)


def check_flags(
    *,
    generate: int | None = None,
    examples: Path | None = None,
    exclude: list[str] = (),
    yes: bool = False,
    batch_in: list[str] | None = None,
) -> None:
    """Raise UserError for flags that do not go together."""
    for name, given in {"examples": examples, "exclude": exclude, "yes": yes}.items():
        if given and not generate:
            raise UserError(f"--{name}: it is for inputs that a teacher writes; expected --generate N too")
    if batch_in and generate:
        raise UserError("--batch_in: results are of rows that exist, and --generate writes new ones; expected only one")


def check_on_policy(teacher: Teacher | None, task: Task | None, alpha: float) -> None:
    """Raise UserError unless `teacher` can score what the student writes. alpha: weight of the given text."""
    if not learns_token_distribution(teacher, task):
        raise UserError("--on_policy: expected free text and --teacher MODEL, whose log-probs the student's texts get")
    if alpha:
        raise UserError(f"--alpha {alpha:g}: it is the weight of a given text, and --on_policy has none; expected 0")
    require_single_process(teacher)


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


def teach(
    teacher: Teacher,
    rows: list[dict],
    task: Task | None,
    tokenizer,
    *,
    data: Path,
    max_len: int,
    seed: int,
    batch_in: list[str] | None = None,
) -> tuple[list[dict], dict]:
    """Fill in teacher_output where it is missing: (rows to train on, what run.json records of it).

    For a label task, gradient boosting, local models and endpoints other than chat give teacher_probs too. For free
    text the teacher writes the answer. Rows whose prompt exceeds max_len tokens are not asked for. batch_in: results
    of the Batch API, read instead of asking.

    Raises UserError when no row is left.
    """
    untaught = [r for r in rows if not r.get("teacher_output")]
    record = {"rows_untaught": {}}
    if not untaught:
        if not learns_token_distribution(teacher, task):
            print(f"every row has its teacher_output: --teacher {teacher.name} is not asked")
        return rows, record
    if task and not teacher.endpoint:
        probs = boosted(untaught, task, data, seed) if teacher.name == BOOSTING else scored(teacher, untaught, task)
        for row, p in zip(untaught, probs, strict=True):
            row["teacher_probs"] = dict(zip(task.labels, map(float, p), strict=True))
            row["teacher_output"] = task.labels[int(np.argmax(p))]
    else:
        record = answered(teacher, untaught, task, tokenizer, data, max_len, batch_in)
    dropped = record["rows_untaught"]
    taught = [r for r in rows if r.get("teacher_output")]
    given = len(untaught) - sum(dropped.values())
    print(f"{teacher.name} taught {given} rows" + "".join(f"; {n} {why}" for why, n in dropped.items()))
    if not taught:
        raise UserError(f"{data}: no row has an answer to train on: {dropped} of {len(rows)} rows")
    return taught, record


def boosted(rows: list[dict], task: Task, data: Path, seed: int) -> np.ndarray:
    """[N, L] probabilities by gradient boosting on the fields in the prompts, out of fold by customer."""
    from distill.tasks.boosting import out_of_fold
    from distill.tasks.creditmix import customer

    if not all(r.get("output") for r in rows):
        raise UserError(f"{data}: --teacher gradient-boosting learns from field 'output'; a row has none")
    label_classes(data, rows, "output", task)
    texts = [input_text(task, r["input"]) for r in rows]
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
    clear_device_cache(garbage_collection=True)
    return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def answered(
    teacher: Teacher,
    rows: list[dict],
    task: Task | None,
    tokenizer,
    data: Path,
    max_len: int,
    batch_in: list[str] | None = None,
) -> dict:
    """Give rows the teacher's text or label probabilities where they can be trained on; returns teach's record."""
    prompt_tokens, answers, todo = open_answers(teacher, rows, task, tokenizer, data, max_len)
    endpoint = teacher.endpoint
    protocol = endpoint and endpoint.protocol(task, max_len)
    if batch_in:
        found, failed = read_batch(batch_in, protocol, list(todo))
        for prompt, answer in found.items():
            answers.keep(prompt, answer)
        print(f"{len(found)} results of the batch" + "".join(f"; {n} {why}" for why, n in failed.items()))
    elif todo:
        require_single_process(teacher)
        if endpoint:
            spent = endpoint.cost(*usage_of(answers.of, prompt_tokens, protocol.max_tokens)) or 0.0
            announce_cost(endpoint, todo, protocol.max_tokens, spent)
            ask_endpoint(endpoint, protocol, todo, answers.keep, spent)
        else:
            generate(teacher, list(todo), max_len, answers.keep)
    dropped = {f"longer than {max_len} tokens": sum(r["input"] not in prompt_tokens for r in rows)}
    dropped |= use_answers([r for r in rows if r["input"] in prompt_tokens], answers, task)
    record = {"rows_untaught": {why: n for why, n in dropped.items() if n}}
    if endpoint:
        used = usage_of(answers.of, prompt_tokens, protocol.max_tokens)
        record["teacher_usage"] = {"input_tokens": used[0], "output_tokens": used[1], "cost": endpoint.cost(*used)}
    return record


def open_answers(
    teacher: Teacher, rows: list[dict], task: Task | None, tokenizer, data: Path, max_len: int
) -> tuple[dict[str, int], StoredAnswers, dict[str, int]]:
    """({prompt: its tokens} of the prompts under max_len, the stored answers, the part of them without an answer)."""
    prompts = list(dict.fromkeys(r["input"] for r in rows))
    lengths = map(len, prompt_ids(tokenizer, prompts))
    prompt_tokens = {prompt: n for prompt, n in zip(prompts, lengths, strict=True) if n < max_len}
    settings = [teacher.identity(), LABEL_TOKENS if task else max_len]
    if teacher.endpoint and teacher.endpoint.api != "chat":
        settings += [teacher.endpoint.api, {k: v for k, v in asdict(task).items() if k != "columns"}]
    answers = StoredAnswers(cache_folder(data) / f"answers-{sha256(json.dumps(settings))[:16]}.jsonl")
    todo = {prompt: n for prompt, n in prompt_tokens.items() if prompt not in answers.of}
    print(f"{teacher.name}: {len(prompt_tokens)} prompts need an answer, {len(todo)} of them are not in {answers.path}")
    return prompt_tokens, answers, todo


def write_requests(
    teacher: Teacher, rows: list[dict], task: Task | None, tokenizer, *, data: Path, max_len: int, path: Path
) -> None:
    """Write the requests for rows without an answer to `path`, for the Batch API. Nothing is sent."""
    untaught = [r for r in rows if not r.get("teacher_output")]
    prompt_tokens, answers, todo = open_answers(teacher, untaught, task, tokenizer, data, max_len)
    if not todo:
        raise UserError(f"--batch_out {path}: every row has an answer; nothing was written")
    endpoint = teacher.endpoint
    protocol = endpoint.protocol(task, max_len)
    spent = endpoint.cost(*usage_of(answers.of, prompt_tokens, protocol.max_tokens)) or 0.0
    announce_cost(endpoint, todo, protocol.max_tokens, spent)
    paths = write_batch(path, endpoint, protocol, list(todo))
    files = ", ".join(map(str, paths))
    print(f"{files}: requests for the Batch API; the same command reads the results with --batch_in")


def generate(teacher: Teacher, prompts: list[str], max_tokens: int, keep: Callable[[str, Answer], None]) -> None:
    """Greedy answers of a local model: keep(prompt, answer). Prompt and answer share `max_tokens`."""
    from tqdm import tqdm

    from distill.model.generate import context_length
    from distill.model.generate import generate as generate_replies

    model, tokenizer = load_model(teacher.name, teacher.precision)
    ids, most = prompt_ids(tokenizer, prompts), min(max_tokens, context_length(model))
    bar = tqdm(total=len(prompts), desc="teacher", unit="answer", file=sys.stderr)

    def take(i, _, reply):
        keep(prompts[i], Answer(text=reply.text, whole=reply.ended))
        bar.update()

    generate_replies(model, tokenizer, ids, [max(1, most - len(row)) for row in ids], on_reply=take)
    bar.close()
    del model
    clear_device_cache(garbage_collection=True)
