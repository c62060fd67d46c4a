"""What the student itself writes: its answers to prompts, sampled and kept on disk as they come."""

import sys
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm

from common import completion_ids, load_model, prompt_ids, unit_hash
from distill.files import ResumableJsonl, sha256
from distill.model.generate import Reply, context_length, generate


def prompts_under(tokenizer, rows: list[dict], max_len: int) -> tuple[list[dict], dict[str, int]]:
    """Rows whose prompt leaves room for an answer, with "prompt_ids", and {reason: rows dropped}."""
    ids = prompt_ids(tokenizer, [r["input"] for r in rows])
    kept = [{**row, "prompt_ids": own} for row, own in zip(rows, ids, strict=True) if len(own) < max_len]
    return kept, {f"prompt of {max_len} tokens or more": len(rows) - len(kept)}


def repeated(rows: list[dict], n: int, seed: int) -> list[dict]:
    """n rows: all of them in a seeded order, over and over."""
    order = sorted(rows, key=lambda r: unit_hash(seed, r["input"]))
    return [order[i % len(order)] for i in range(n)]


def sample_student(
    policy: str | Path, precision: str, rows: list[dict], max_len: int, seed: str, path: Path
) -> list[dict]:
    """The student's answers to the rows' prompts, encoded as by encode(); its memory is freed.

    policy: the student as it is, a model or an adapter folder. seed: with a row's place it determines its sample.
    path: of the samples, which a killed run continues. Prompt and answer share max_len tokens; an answer that was cut
    is as good to train on as a whole one, since the teacher is compared at each token.
    """
    stored = ResumableJsonl(path)
    found = {r["place"]: r for r in stored.rows}
    todo = [i for i in range(len(rows)) if i not in found]
    if todo:
        model, tokenizer = load_model(policy, precision)
        (end,) = completion_ids(tokenizer, ["x"], ["x"])[0][-1:]
        most = min(max_len, context_length(model))
        bar = tqdm(total=len(todo), desc="student", unit="answer", file=sys.stderr)

        def keep(i: int, _: int, reply: Reply) -> None:
            tokens = reply.tokens + [end] * reply.ended
            stored.append({"place": todo[i], "tokens": tokens, "ended": reply.ended, "text": reply.text})
            bar.update()

        generate(
            model,
            tokenizer,
            [rows[i]["prompt_ids"] for i in todo],
            [most - len(rows[i]["prompt_ids"]) for i in todo],
            batch_size=128 if model.device.type == "cuda" else 16,
            temperature=1.0,
            seed=[int(sha256(f"{seed}:{i}")[:12], 16) for i in todo],
            on_reply=keep,
        )
        bar.close()
        del model
        clear_device_cache(garbage_collection=True)
        found = {r["place"]: r for r in stored.rows}
    return [encode_sample(row, found[i]) for i, row in enumerate(rows)]


def encode_sample(row: dict, sample: dict) -> dict:
    """A row with the tokens that the student wrote as its answer.

    They are those that were drawn: tokenised again, the same text may be others, which the student did not write.
    """
    prompt, answer = row["prompt_ids"], sample["tokens"]
    return {
        **{field: row[field] for field in ("input", "row_number", "hashes")},
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "texts": [(prompt + answer, len(answer))],
        "ended": sample["ended"],
    }
