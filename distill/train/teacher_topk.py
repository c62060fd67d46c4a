"""A teacher's top-k log-probs at the trained tokens of free text, on disk: what token-level KD learns from.

One pass of the teacher in shards that are kept (a killed run computes the rest), then the teacher is freed and the
student's weights load: the two never share the memory.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError, safe_open

from common import completion_ids, load_model, prompt_ids
from distill.files import UserError, atomic_write, sha256
from distill.train.teachers import Teacher, require_single_process, shared_vocabulary

SHARD = 64  # rows: what a kill may cost


class TopK:
    """The teacher's k most likely tokens at every trained position, computed once and read from disk row by row.

    A shard is a safetensors file of SHARD rows: ids [T, k] in 16 bits where the vocabulary allows, and logp [T, k + 1]
    in float16, the last one being all other tokens together. Its name is a hash of the teacher, k and the rows, so
    another teacher or another text never matches it, and a longer run reuses what a shorter one has computed.
    """

    def __init__(self, teacher: Teacher, student: str, rows: list[dict], k: int, folder: Path):
        """Compute the shards that `folder` does not have, then free the teacher.

        rows: the result of encode(), or of encode_samples(), whose tokens the student wrote itself.
        """
        self.size, self.k = shared_vocabulary(teacher.name, student), k
        if self.k >= self.size:
            raise UserError(f"--top_k {self.k}: expected fewer than the {self.size} tokens of the vocabulary")
        identity = teacher.identity()
        for i, row in enumerate(rows):
            row["row"] = i
        self.shards = [rows[i : i + SHARD] for i in range(0, len(rows), SHARD)]
        self.counts = [[len(r["labels"]) - r["labels"].count(-100) for r in shard] for shard in self.shards]
        texts = [
            [[r["input"], r["input_ids"][-n:]] for r, n in zip(*x, strict=True)]
            for x in zip(self.shards, self.counts, strict=True)
        ]
        names = [sha256(json.dumps([identity, self.k, self.size, text]))[:16] for text in texts]
        self.paths = [folder / f"topk-{name}.safetensors" for name in names]
        todo = [i for i, path in enumerate(self.paths) if not self.is_complete(i, path)]
        if todo:
            require_single_process(teacher)
            self._compute(teacher, student, todo)
        opened.cache_clear()  # a file that was computed again has another content
        tokens = sum(map(sum, self.counts))
        kept = sum(float(opened(path).metadata()["kept"]) for path in self.paths)
        self.record = {
            "top_k": self.k,
            "tokens": tokens,
            "bytes_a_token": round(sum(p.stat().st_size for p in self.paths) / tokens, 1),
            "kept_mass": round(kept / tokens, 5),
            "shards_computed": len(todo),
        }
        print(
            f"{teacher.name}: top {self.k} at {tokens} tokens in {folder}: {self.record['bytes_a_token']} bytes a "
            f"token, {self.record['kept_mass']:.2%} of the probability; {len(todo)} of {len(self.paths)} shards new"
        )

    def is_complete(self, shard: int, path: Path) -> bool:
        """Whether the file holds the shard; one that is cut short or has other contents is computed again."""
        tokens = sum(self.counts[shard])
        try:
            found = safe_open(path, "np")
            shapes = [found.get_slice(name).get_shape() for name in ("ids", "logp")]
            if float(found.metadata()["kept"]) > 0 and shapes == [[tokens, self.k], [tokens, self.k + 1]]:
                return True
        except (OSError, SafetensorError, TypeError, LookupError, ValueError):
            pass
        return False

    def _compute(self, teacher: Teacher, student: str, todo: list[int]) -> None:
        from tqdm import tqdm

        model, own = load_model(teacher.name, teacher.precision)
        bar = tqdm(total=sum(sum(self.counts[i]) for i in todo), desc="teacher", unit="token", file=sys.stderr)
        for i in todo:
            prompts = [r["input"] for r in self.shards[i]]
            answers = [r["input_ids"][-n:] for r, n in zip(self.shards[i], self.counts[i], strict=True)]
            begins = prompt_ids(own, prompts)
            if "teacher_output" in self.shards[i][0]:  # a text; what the student sampled is tokens already
                texts = [r["teacher_output"] for r in self.shards[i]]
                if completion_ids(own, prompts, texts, begins) != answers:
                    raise UserError(
                        f"{teacher.name}: its chat template writes an answer with other tokens than {student}'s"
                    )
            save_shard(self.paths[i], model, list(zip(begins, answers, strict=True)), self.size, self.k)
            bar.update(sum(self.counts[i]))
        bar.close()
        del model
        clear_device_cache(garbage_collection=True)

    def __getitem__(self, row: int):
        """(ids [T, k] long, logp [T, k + 1] float) of the row with number row["row"]."""
        import torch

        shard, at = divmod(row, SHARD)
        start = sum(self.counts[shard][:at])
        rows = slice(start, start + self.counts[shard][at])
        f = opened(self.paths[shard])
        ids, logp = (f.get_slice(name)[rows] for name in ("ids", "logp"))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logp.astype(np.float32))


@cache
def opened(path):
    return safe_open(path, "np")  # mapped: only what a batch reads is in memory


def save_shard(path: Path, model, pairs: list[tuple[list[int], list[int]]], size: int, k: int) -> None:
    """Write the log-probs of the teacher's k most likely tokens, and of all others together, at each completion token.

    pairs: (prompt ids, completion ids). size: the ids that the student has too; higher ones are padding.
    """
    import torch
    from safetensors.numpy import save

    ids, logp = [], []
    for batch in token_batches(pairs, 1024 if model.device.type == "cpu" else 2048):
        width = max(len(p) + len(a) for p, a in batch)
        tokens, seen = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(2))
        keep = torch.zeros(len(batch), width, dtype=torch.bool)
        for b, (p, a) in enumerate(batch):
            tokens[b, : len(p) + len(a)] = torch.tensor(p + a)
            seen[b, : len(p) + len(a)] = 1
            keep[b, len(p) - 1 : len(p) + len(a) - 1] = True  # the token before each predicts it
        tokens, seen, keep = (x.to(model.device) for x in (tokens, seen, keep))
        with torch.inference_mode():
            out = model(input_ids=tokens, attention_mask=seen, logits_to_keep=keep, use_cache=False).logits
            for part in out.view(-1, out.shape[-1])[:, :size].split(256):
                logs = part.float().log_softmax(-1)
                top = logs.topk(k, -1)
                rest = logs.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
                both = torch.cat([top.values, rest], 1).clamp(min=-60000)  # float16 ends there
                if both.isnan().any():
                    raise UserError(f"{model.config.name_or_path}: its log-probs are NaN; expected another --precision")
                ids.append(top.indices.cpu().numpy().astype(np.uint16 if size <= 65536 else np.int32))
                logp.append(both.half().cpu().numpy())
    ids, logp = np.concatenate(ids), np.concatenate(logp)
    kept = np.exp(logp[:, :-1].astype(np.float64)).sum()
    with atomic_write(path, "wb") as f:
        f.write(save({"ids": ids, "logp": logp}, metadata={"kept": repr(float(kept))}))


def token_batches(rows, budget: int):
    """Yield the rows in order, in batches of at most `budget` tokens with padding, or of one row."""
    batch, width = [], 0
    for row in rows:
        longest = max(width, len(row[0]) + len(row[1]))
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], len(row[0]) + len(row[1])
        batch, width = [*batch, row], longest
    if batch:
        yield batch
