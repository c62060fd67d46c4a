"""What answers KD rows that have no answer: gradient boosting, a model, or an OpenAI-compatible endpoint.

kd_train.py calls check, then teach. What a teacher has written lies beside the data, in NAME_kd.teacher/ for
NAME_kd.jsonl, so a killed run asks only for the rest. A teacher is gone before the student's weights load. Its
log-probs: distill/teacher_topk.py.
"""

import asyncio
import gc
import json
import os
import sys
from pathlib import Path

import numpy as np

from common import Calibration, LabelScorer, label_classes, load_model, prompt_ids
from distill.files import UserError, check_row, parse_json, sha256
from distill.model.hub import adapter_base, base_config

BOOSTING = "gradient-boosting"
LABEL_TOKENS = 64  # of a label task's answer: a label and the words that some teachers put around it
AT_ONCE = 8  # requests to an endpoint
ATTEMPTS = 6  # a request, with 0.5, 1, 2, ... seconds between them, or what the server's Retry-After says


def is_endpoint(teacher):
    return bool(teacher) and "://" in teacher


def by_tokens(args, task):
    """Whether the run learns the teacher's token distributions: free text and a teacher whose logits can be had."""
    return bool(args.teacher) and task is None and args.teacher != BOOSTING and not is_endpoint(args.teacher)


def check(args, task):
    """Refuse an impossible teacher before anything loads or is asked; UserError says what was expected."""
    if is_endpoint(args.teacher):
        import httpx2

        try:
            url = httpx2.URL(args.teacher)
        except httpx2.InvalidURL as e:
            raise UserError(f"--teacher {args.teacher}: {e}; expected http://host:port/v1") from None
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise UserError("--teacher: expected http://host:port/v1 or https, a key only in OPENAI_API_KEY")
        if not args.teacher_model:
            raise UserError(f"--teacher {args.teacher}: expected --teacher_model, the model's name there")
    elif args.teacher == BOOSTING and task is None:
        raise UserError(f"--teacher {BOOSTING}: free text has no classes; expected a label task (--task)")
    elif by_tokens(args, task):
        shared_vocabulary(args.teacher, args.student)


def shared_vocabulary(teacher, student):
    """How many token ids both models have; UserError unless they differ by padding rows alone. Loads no weights.

    Qwen2.5 has 151,936 rows of logits up to 3B and 152,064 from 7B on, for the same 151,665 tokens.
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


def identity(args):
    """What a cache depends on: the teacher by name and, where it is a folder, by its files; a retrained one is new."""
    if is_endpoint(args.teacher):
        return [args.teacher, args.teacher_model]
    from huggingface_hub import try_to_load_from_cache

    names, state = [args.teacher], []
    if (Path(args.teacher) / "adapter_config.json").is_file():
        names.append(adapter_base(args.teacher))
    for name in names:
        if Path(name).is_dir():
            files = sorted(p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
            state += [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        else:
            state.append(try_to_load_from_cache(name, "config.json"))  # a hub id: its path has the commit
    return [names, args.precision, state]


def cache_folder(args):
    return args.data.with_name(f"{args.data.stem}.teacher")


def one_process(what):
    """UserError under `accelerate launch`: each process would ask the teacher for everything."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{what}: expected one process for the teacher; run once without `accelerate launch`")


def free():
    """Give the memory of a model that the caller has let go back to the device."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def teach(args, rows, task, tokenizer):
    """Give rows without teacher_output theirs by args.teacher -> (rows to train on, {reason: rows dropped}).

    Label tasks: gradient boosting and models give teacher_probs too, an endpoint its label alone. Free text: the whole
    answer. Rows whose prompt is over --max_len are not asked for. Error: UserError when no row is left.
    """
    untaught = [r for r in rows if not r.get("teacher_output")]
    if not untaught:
        if not by_tokens(args, task):
            print(f"every row has its teacher_output: --teacher {args.teacher} is not asked")
        return rows, {}
    dropped = {}
    if task and not is_endpoint(args.teacher):
        probs = boosted(args, untaught, task) if args.teacher == BOOSTING else scored(args, untaught, task)
        for row, p in zip(untaught, probs, strict=True):
            row["teacher_probs"] = dict(zip(task.labels, map(float, p), strict=True))
            row["teacher_output"] = task.labels[int(np.argmax(p))]
    else:
        dropped = answered(args, untaught, task, tokenizer)
    taught = [r for r in rows if r.get("teacher_output")]
    given = len(untaught) - sum(dropped.values())
    print(f"{args.teacher} taught {given} rows" + "".join(f"; {n} {why}" for why, n in dropped.items()))
    if not taught:
        raise UserError(f"{args.data}: no row has an answer to train on: {dropped} of {len(rows)} rows")
    return taught, dropped


def boosted(args, rows, task):
    """[N, L] probabilities by gradient boosting on the rows' own fields, out of fold by customer."""
    from distill.tasks.boosting import out_of_fold
    from distill.tasks.creditmix import customer

    before, behind = task.template.split("{input}")
    if not all(r.get("output") for r in rows):
        raise UserError(f"{args.data}: --teacher gradient-boosting learns from field 'output'; a row has none")
    label_classes(args.data, rows, "output", task)
    texts = [r["input"].removeprefix(before).removesuffix(behind) for r in rows]
    own = zip(rows, texts, strict=True)
    fields = [{"question": t, "answer": r["output"], "group": r.get("group") or customer(t)} for r, t in own]
    return out_of_fold(fields, task.labels, args.seed)  # no row is taught by a model that saw its customer


def scored(args, rows, task):
    """[N, L] probabilities by a model through the scorer, with the calibration that lies beside it."""
    model, tokenizer = load_model(args.teacher, args.precision)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    raw = scorer.score([r["input"] for r in rows], progress=True)
    scores = Calibration.load(args.teacher, task)(raw, scorer.prior(task))
    del model, scorer
    free()
    return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def answered(args, rows, task, tokenizer):
    """Set teacher_output from a teacher's text where it can be trained on -> {reason: rows that cannot}."""
    budget = LABEL_TOKENS if task else args.max_len
    lengths = map(len, prompt_ids(tokenizer, [r["input"] for r in rows]))
    fits = [r for r, n in zip(rows, lengths, strict=True) if n < args.max_len]
    dropped = {f"longer than {args.max_len} tokens": len(rows) - len(fits)}
    name = sha256(json.dumps([identity(args), budget]))[:16]
    answers = Answers(cache_folder(args) / f"answers-{name}.jsonl")
    todo = list(dict.fromkeys(r["input"] for r in fits if r["input"] not in answers.of))
    print(f"{args.teacher}: {len(fits)} rows need an answer, {len(todo)} of them are not in {answers.path}")
    if todo:
        one_process(f"--teacher {args.teacher}")
        ask = ask_endpoint if is_endpoint(args.teacher) else generate
        ask(args, todo, budget, answers.keep)
    useless = []
    for row in fits:
        text, whole = answers.of[row["input"]]
        if task:
            row["teacher_output"] = label_of(text, task.labels)
        elif whole and text.strip():  # the end of a turn must not be taught in mid-sentence
            row["teacher_output"] = text
        if not row.get("teacher_output"):
            useless.append(text)
    if useless:
        why = "answers that are no label" if task else "answers that are empty or longer than --max_len"
        print(f"{len(useless)} {why}, kept in {answers.path}; for example {useless[0][:60]!r}")
        dropped[why] = len(useless)
    return {why: n for why, n in dropped.items() if n}


def label_of(text, labels):
    """The label that an answer is, behind "Answer:" or not, in whatever case and marks; None where that is not plain.

    A label named inside a sentence is none: "not Bad" would teach the opposite.
    """
    for part in (text, text.rpartition(":")[2]):
        if part.strip() in labels:
            return part.strip()
        bare = part.strip(" \t\r\n*_`\"'.!()[]").casefold()
        found = [label for label in labels if label.casefold() == bare]
        if len(found) == 1:
            return found[0]
    return None


class Answers:
    """A teacher's answers by prompt, a line of JSON each, written as it comes. of: {prompt: (text, whole or cut)}."""

    def __init__(self, path):
        self.path, self.of = path, {}
        if not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")
        if lines.pop():  # a killed run's last line
            os.truncate(path, sum(len(line) + 1 for line in lines))
        for i, line in enumerate(lines, 1):
            row = parse_json(line.decode("utf-8", "replace"), path, i)
            check_row(f"{path}:{i}", row, {"prompt": str}, {"text": str, "whole": bool})
            self.of[row["prompt"]] = row.get("text") or "", bool(row.get("whole"))

    def keep(self, prompt, text, whole):
        text = text.encode("utf-8", "replace").decode()  # half a character (a lone surrogate) is no text
        line = json.dumps({"prompt": prompt, "text": text, "whole": whole}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as f:  # one write a line: a kill tears the last one at most
            f.write(line.encode() + b"\n")
        self.of[prompt] = text, whole


def generate(args, prompts, budget, keep):
    """Greedy answers of a local model, in batches of prompts of similar length; prompt and answer fit in `budget`."""
    from tqdm import tqdm

    from distill.tasks.codegen_samples import reply_to

    model, tokenizer = load_model(args.teacher, args.precision)
    lengths = {p: len(ids) for p, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True)}
    prompts = sorted(prompts, key=lengths.__getitem__)
    bar = tqdm(total=len(prompts), desc="teacher", unit="answer", file=sys.stderr)
    for i in range(0, len(prompts), 16):
        batch = prompts[i : i + 16]
        most = max(1, min(budget, model.config.get_text_config().max_position_embeddings) - lengths[batch[-1]])
        for prompt, (text, tokens) in zip(batch, reply_to(model, tokenizer, batch, most, 0), strict=True):
            keep(prompt, text, tokens < most)
        bar.update(len(batch))
    bar.close()
    del model
    free()


def ask_endpoint(args, prompts, budget, keep):
    """Ask args.teacher for every prompt, AT_ONCE at a time; keep(prompt, text, whole) each answer as it comes.

    Errors: UserError naming address and status when a request fails ATTEMPTS times, at once where trying again is
    no use; what was kept stays.
    """
    from tqdm import tqdm

    url = f"{args.teacher.rstrip('/')}/chat/completions"
    bar = tqdm(total=len(prompts), desc="teacher", unit="answer", file=sys.stderr)

    def kept(prompt, answer):
        keep(prompt, *answer)
        bar.update()

    try:
        asyncio.run(ask_all(args, url, prompts, budget, kept))
    except UserError as e:
        raise UserError(f"{e}; {bar.n} of {len(prompts)} answers are kept, the same command goes on") from None
    finally:
        bar.close()


async def ask_all(args, url, prompts, budget, kept):
    import httpx2

    key = os.environ.get("OPENAI_API_KEY", "").strip()  # a line break from a file is no part of it
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: expected printable ASCII characters")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=AT_ONCE)
    waiting = iter(prompts)
    # asyncio and no threads: Ctrl-C ends the requests under way, and a limit of time holds for a whole answer
    async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as client:

        async def worker():
            for prompt in waiting:
                body = {"model": args.teacher_model, "messages": [{"role": "user", "content": prompt}]}
                body |= {"temperature": 0, "max_tokens": budget}
                kept(prompt, await ask_one(client, url, body, args.teacher_timeout))

        await asyncio.gather(*(worker() for _ in range(min(AT_ONCE, len(prompts)))))


async def ask_one(client, url, body, seconds):
    """(text, whole or cut) of one request, tried again while that can help."""
    import httpx2

    for attempt in range(1, ATTEMPTS + 1):
        wait = 0.5 * 2 ** (attempt - 1)
        try:
            async with asyncio.timeout(seconds):
                answer = await client.post(url, json=body)
            code = answer.status_code
            if code == 200:
                return read_answer(answer)
            problem = f"status {code}: {answer.text[:200].strip()!r}"
            if code not in (408, 409, 425, 429) and code < 500:
                raise UserError(f"{url}: {problem} to the prompt {body['messages'][0]['content'][:40]!r}")
            after = answer.headers.get("retry-after", "")
            wait = min(float(after), 60) if after.isdecimal() else wait
        except TimeoutError:
            problem = f"no answer in {seconds:g} s (--teacher_timeout)"
        except httpx2.RequestError as e:
            problem = f"{type(e).__name__}: {e}"
        except ValueError as e:
            problem = f"status 200, but {e}"
        if attempt < ATTEMPTS:
            await asyncio.sleep(wait)
    raise UserError(f"{url}: {problem}, {ATTEMPTS} times")


def read_answer(answer):
    """(text, whole or cut) of a chat completion; ValueError when the body is none."""
    try:
        choice = answer.json()["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = ()
    if not isinstance(text, str | None):
        raise ValueError(f"no choices[0].message.content in {answer.text[:80]!r}")
    return text or "", choice.get("finish_reason") != "length"
