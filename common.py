"""What every stage shares: the task, the split, the prompt, the label scorer, calibration.

Loading models, files and errors are passed on from distill/. Nothing here is run by itself; `python sft_train.py
--help` and the README show the stages.
"""

import functools
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.files import (  # noqa: F401 - every stage takes these from here
    ROOT,
    UserError,
    atomic_write,
    between,
    check_row,
    cli,
    file_sha256,
    parse_json,
    positive,
    read_json,
    read_rows,
    read_text,
    sha256,
    write_json,
    write_jsonl,
)
from distill.models import (  # noqa: F401
    DEFAULT_STUDENT,
    EMBEDDED,
    adapter_base,
    add_adapter,
    base_config,
    check_models,
    load_base,
    load_model,
)

# transformers warns of what it does itself
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
# PEFT looks on the hub for a student that came as a package or a folder, and says that it is not there
warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file in")
# bitsandbytes asks for a package that would fetch its CPU kernel from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
VAL_FRAC = 0.35  # of the customers: leaves 1,500 held-out rows in the smallest class of the public data
SEED = 42


# ---------------------------------------------------------------------------------------------------------------------
# The task: labels, the instruction around the input, content-free inputs


@dataclass(frozen=True)
class Task:
    """A label task as data (data/creditmix_task.json); it travels with the adapter as task.json.

    template: the whole user message, with {input} where the row's text goes. Keep what is constant in front of it:
              the scorer computes that head once.
    null_inputs: content-free inputs whose mean score is the model's prior (Zhao et al. 2021).
    """

    name: str
    labels: tuple
    template: str
    null_inputs: tuple

    @classmethod
    def load(cls, path):
        path = Path(path)
        d = read_json(path)
        check_row(path, d, {"name": str, "labels": list, "template": str, "null_inputs": list}, {})
        for field, least in (("labels", 2), ("null_inputs", 1)):
            values = d[field]
            if len(values) < least or not all(isinstance(v, str) for v in values):
                raise UserError(f"{path}: field '{field}': expected a list of at least {least} strings")
            for value in values:
                check_row(path, {field: value}, {}, {field: str})
        labels = d["labels"]
        if len(set(labels)) < len(labels) or not all(label.strip() == label != "" for label in labels):
            raise UserError(f"{path}: field 'labels': expected different labels without surrounding white space")
        if d["template"].count("{input}") != 1:
            raise UserError(f"{path}: field 'template': expected {{input}} exactly once")
        return cls(d["name"], tuple(labels), d["template"], tuple(d["null_inputs"]))

    @classmethod
    def of(cls, model_dir, otherwise):
        """The task that travels with an adapter, else the one in the file `otherwise`."""
        own = Path(model_dir) / "task.json"
        return cls.load(own if own.is_file() else otherwise)

    def save(self, path):
        write_json(path, asdict(self))

    def prompt(self, text):
        """The user message for one input. The one place where it is built."""
        return self.template.replace("{input}", text)

    def null_prompts(self):
        return [self.prompt(text) for text in self.null_inputs]


def label_classes(path, rows, field, task, unknown=()):
    """Class numbers [N] of rows[field] in the task's order, -1 where it is one of the values `unknown`.

    Error: UserError naming the row whose value is no label.
    """
    import numpy as np

    number = dict.fromkeys(unknown, -1) | {label: i for i, label in enumerate(task.labels)}
    values = [row.get(field) for row in rows]
    for i, value in enumerate(values, 1):
        if value not in number:
            raise UserError(f"{path}: row {i}: field '{field}': {value!r} is no label; expected {task.labels}")
    return np.array([number[value] for value in values], dtype=int)


# ---------------------------------------------------------------------------------------------------------------------
# The split: by customer, the same in every stage, with no state but file and seed


def unit_hash(seed, key):
    """A number in [0, 1) that depends on seed and key alone."""
    return int(sha256(f"{seed}:{key}")[:13], 16) / 16**13


def prompt_of(row):
    """The user message of a training row of any route."""
    return row.get("input") or row["prompt"]


def row_hash(prompt):
    """What a training run records of a row, and what an evaluation compares."""
    return sha256(prompt)[:16]


def group_hash(group):
    """What prepared rows carry of their customer: enough to keep one together, not who it is."""
    return sha256(group)[:12]


def holdout(rows, seed=SEED, frac=VAL_FRAC):
    """Split rows (dicts with a "group") into (training, held out) so that no group is on both sides.

    A smaller `frac` holds out a subset of what a larger one does, so evaluating on less than was kept apart is safe.
    """
    held = [unit_hash(f"holdout:{seed}", r["group"]) < frac for r in rows]
    return [r for r, h in zip(rows, held, strict=True) if not h], [r for r, h in zip(rows, held, strict=True) if h]


def dev_split(rows, seed=SEED, frac=0.1):
    """Split training rows into (train, development) by their "group", else by their prompt: answers play no part.

    The development rows belong to training: they choose the checkpoint and fit the calibration.
    """
    dev = [unit_hash(f"dev:{seed}", r.get("group") or prompt_of(r)) < frac for r in rows]
    return [r for r, d in zip(rows, dev, strict=True) if not d], [r for r, d in zip(rows, dev, strict=True) if d]


# ---------------------------------------------------------------------------------------------------------------------
# The prompt, as trained and as scored


def prompt_ids(tokenizer, prompts):
    """Token ids of each user message up to the assistant's turn: list[str] -> list[list[int]]."""
    texts = [_chat(tokenizer, p) for p in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def completion_ids(tokenizer, prompts, answers, begins=None):
    """Token ids of each answer behind its prompt, the end of the turn included: list[str] x 2 -> list[list[int]].

    begins: prompt_ids(tokenizer, prompts), where they are known.
    Error: UserError where prompt and answer do not meet at a token boundary, since what is trained would then not be
    what is scored.
    """
    whole = [_chat(tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
    whole = tokenizer(whole, add_special_tokens=False)["input_ids"] if whole else []
    out = []
    for prompt, ids, answer in zip(begins or prompt_ids(tokenizer, prompts), whole, answers, strict=True):
        tail = ids[len(prompt) :]
        if ids[: len(prompt)] != prompt or tokenizer.eos_token_id not in tail:
            raise UserError(f"answer {answer[:40]!r}: the chat template does not put it behind the prompt and end it")
        # what some templates put behind the end of the turn (a line break) is never generated
        out.append(tail[: tail.index(tokenizer.eos_token_id) + 1])
    return out


def harmless(tokenizer, text):
    """The text with a blank in each special token: text from outside must not open or close a turn."""
    for token in special_tokens(tokenizer):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


@functools.lru_cache(8)  # reading them takes longer than all else that is done to a prompt
def special_tokens(tokenizer):
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]


def _chat(tokenizer, user, answer=None):
    messages = [{"role": "user", "content": harmless(tokenizer, user)}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)


# ---------------------------------------------------------------------------------------------------------------------
# The label scorer


def label_trie(tokenizer, labels, prompt="x"):
    """The trie of the labels as they stand behind a prompt (LabelTrie).

    Where one label's tokens begin another's, the end of the turn is scored too, for all of them.
    """
    from distill.trees import LabelTrie

    ids = completion_ids(tokenizer, [prompt] * len(labels), list(labels))
    bare = [i[:-1] for i in ids]
    nested = any(a is not b and a == b[: len(a)] for a in bare for b in bare)
    return LabelTrie(ids if nested else bare)


def takes_trees(model):
    """Whether `model` takes token trees (trees.why_no_trees); tried once a model, and said when it does not."""
    from distill.trees import why_no_trees

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "takes_trees"):
        why = why_no_trees(base)
        base.takes_trees = not why
        if why:
            print(f"each label in a forward pass of its own: {why}", file=sys.stderr)
    return base.takes_trees


class LabelScorer:
    """Scores of all labels in one forward pass a prompt, the constant head of the prompts computed once.

    head_prompts: two or more user messages whose common beginning is that head (Task.null_prompts()); without them
    each prompt is computed whole. One scorer belongs to one state of the weights: make a new one after training.
    """

    def __init__(self, model, tokenizer, labels, head_prompts=()):
        from distill.trees import window

        self.model, self.tokenizer, self.labels = model, tokenizer, tuple(labels)
        self.trie = label_trie(tokenizer, self.labels)
        self.head, self._heads, self._stack = [], {}, None
        self.trees, self.window = takes_trees(model), window(model.config.get_text_config())
        if self.trees and len(set(head_prompts)) > 1:
            ids = prompt_ids(tokenizer, head_prompts)
            same = [len(set(column)) == 1 for column in zip(*(i[:-1] for i in ids), strict=False)]
            self.head = ids[0][: [*same, False].index(False)]

    def score(self, prompts, adapters=None, progress=False):
        """Length-normalised log-likelihoods, float array [N, L], of user messages (list[str]).

        adapters: one adapter name a prompt ("__base__" for none), rows of one batch may differ.
        Error: UserError for a prompt longer than the model's context.
        """
        return self.score_ids(prompt_ids(self.tokenizer, prompts), adapters, progress)

    def score_ids(self, ids, adapters=None, progress=False):
        """As score, of what prompt_ids makes of the messages."""
        import numpy as np
        from tqdm import tqdm

        limit = getattr(self.model.config, "max_position_embeddings", 2**31) - len(self.trie.nodes)
        for i, row in enumerate(ids):
            if len(row) > limit:
                raise UserError(f"prompt {i + 1}: {len(row)} tokens; expected at most {limit}")
        out = np.zeros((len(ids), len(self.labels)))
        bar = tqdm(total=len(ids), desc="scoring", unit="row", disable=not progress, file=sys.stderr)
        for rows in self._batches(ids):
            out[rows] = self._score([ids[i] for i in rows], [adapters[i] for i in rows] if adapters else None)
            bar.update(len(rows))
        bar.close()
        return out

    def _batches(self, ids, most=128):
        """Row numbers in batches of similar length: at most `most` rows, and as many tokens as suit the device."""
        budget = 2048 if self.model.device.type == "cpu" else 16384
        batch = []
        for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            if batch and (len(batch) == most or (len(batch) + 1) * len(ids[i]) > budget):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score(self, rows, adapters):
        import torch

        n = len(self.head)
        cache, trees = None, self.trees and max(map(len, rows)) + len(self.trie.nodes) <= self.window
        with torch.inference_mode():
            if trees and n and all(r[:n] == self.head for r in rows):
                cache = self._head_cache(adapters or [None] * len(rows))
                rows = [r[n:] for r in rows]
            if trees:
                logits = self.logits(rows, cache, n if cache else 0, adapters)
            else:
                logits = self.logits_apart(rows, adapters)
            # in parts, since the log-softmax over a large vocabulary is as large as all other activations
            return torch.cat([self.trie.scores(part) for part in logits.split(32)]).cpu().numpy()

    def logits(self, rows, cache=None, head=0, adapters=None):
        """Logits [B, 1 + M, V] where a label token is predicted, for B token id lists."""
        import torch

        from distill.head import fp32_logits
        from distill.trees import additive, tree_batch

        trees = [[(row, -1), *self.trie.behind(0, 1)] for row in rows]
        batch, starts = tree_batch(trees, self.tokenizer.pad_token_id, head)
        # prompt end and nodes stand side by side, so the columns are a range
        keep = torch.tensor([s[0] + len(row) - 1 for s, row in zip(starts, rows, strict=True)])
        batch["logits_to_keep"] = keep[:, None] + torch.arange(1 + len(self.trie.nodes))
        batch = {k: v.to(self.model.device) for k, v in batch.items()}
        batch["attention_mask"] = additive(batch["attention_mask"], self.model.dtype)
        with fp32_logits(self.model):
            return self._forward(adapters, **batch, past_key_values=cache, use_cache=cache is not None).logits

    def _forward(self, adapters, **batch):
        """The model's output, row i with adapters[i]; without names with the adapter that is on."""
        from distill.stacked import StackedAdapters, stackable

        if not adapters:
            return self.model(**batch)
        if self._stack is None:
            self._stack = StackedAdapters(self.model) if stackable(self.model) else False
        if not self._stack:  # DoRA, embeddings and the like: PEFT's way, slower
            return self.model(**batch, adapter_names=adapters)
        with self._stack.rows(adapters):
            return self.model.get_base_model()(**batch)

    def logits_apart(self, rows, adapters=None):
        """As logits, for a model that takes no tree mask: each prompt again in front of each node of the trie."""
        import torch

        paths = [[]]
        for ids, parent in self.trie.nodes:
            paths.append([*paths[parent + 1], *ids])
        texts = [row + path for row in rows for path in paths]
        batch = self.tokenizer.pad({"input_ids": texts}, padding=True, padding_side="right", return_tensors="pt")
        names = [a for a in adapters for _ in paths] if adapters else None
        last = torch.tensor([len(text) - 1 for text in texts])
        logits = self._forward(names, **batch.to(self.model.device), use_cache=False).logits[
            torch.arange(len(texts)), last
        ]
        return logits.view(len(rows), len(paths), -1)

    def _head_cache(self, adapters):
        """Keys and values of the head for each row: LoRA sits on k and v, so every adapter has its own."""
        import torch
        from transformers import DynamicCache

        for name in set(adapters) - set(self._heads):
            ids = torch.tensor([self.head], device=self.model.device)
            names = [name] if name else None
            cache = self._forward(names, input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            self._places = [(part.shape[1:], part.device) for part in parts]  # a large model lies on several devices
            self._heads[name] = torch.cat([part.flatten().to(self.model.device) for part in parts])
        own = list(dict.fromkeys(adapters))
        heads = torch.stack([self._heads[a] for a in own])
        if len(own) > 1:  # one kernel for all layers; rows of one adapter need none
            heads = heads[torch.tensor([own.index(a) for a in adapters], device=heads.device)]
        parts = heads.expand(len(adapters), -1).split([shape.numel() for shape, _ in self._places], 1)
        parts = [part.unflatten(1, shape).to(on) for part, (shape, on) in zip(parts, self._places, strict=True)]
        return DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)))

    def prior(self, task):
        """The model's leaning without content [L]: the mean score of the task's content-free prompts."""
        return self.score(task.null_prompts()).mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


@dataclass(frozen=True)
class Calibration:
    """calibrated = (raw - w * prior + b) / T; unfitted, multi-null calibration as published (arXiv 2511.14385).

    Fitted on development rows (fit_calibration) and kept in calibration.json beside the adapter.
    """

    w: float = 1.0
    b: tuple = ()  # one a label, in the task's order; none means 0
    T: float = 1.0
    fitted: bool = False

    def __call__(self, raw, prior):
        """Calibrated scores [N, L] from raw [N, L] and prior [L]; their softmax is a probability once T is fitted."""
        return (raw - self.w * prior + (self.b or 0.0)) / self.T

    def save(self, folder, task, **record):
        """record: how it was fitted (rows, log-loss before and after)."""
        b = dict(zip(task.labels, self.b, strict=True))
        write_json(Path(folder) / "calibration.json", {"w": self.w, "b": b, "T": self.T, **record})

    @classmethod
    def load(cls, folder, task):
        """The fit beside an adapter, or the unfitted default where there is none."""
        path = Path(folder) / "calibration.json"
        if not path.is_file():
            return cls()
        d = read_json(path)
        check_row(path, d, {"w": (int, float), "b": dict, "T": (int, float)}, {})
        numbers = all(isinstance(v, int | float) and abs(v) < 1e6 for v in (d["w"], d["T"], *d["b"].values()))
        if set(d["b"]) != set(task.labels) or not numbers or not d["T"] > 0:
            raise UserError(f"{path}: fields 'b' and 'T': expected one number for each of {task.labels} and T > 0")
        return cls(d["w"], tuple(float(d["b"][label]) for label in task.labels), d["T"], True)


def log_loss(scores, y):
    """Mean negative log-likelihood of the true classes y [N] under softmax(scores [N, L])."""
    from scipy.special import log_softmax

    return float(-log_softmax(scores, axis=1)[range(len(y)), y].mean())


def fit_calibration(raw, prior, y, ridge=0.02):
    """Calibration of least log-loss on development rows: raw [N, L], prior [L], true classes y [N].

    w is 0 or 1: the prior is either a bias to take away (the base model) or none (most trained ones). The ridge keeps
    b, which could imitate any w, near 0 unless the rows speak for it. Convex in (b / T, 1 / T).
    """
    import numpy as np
    from scipy.optimize import minimize

    if not len(y):
        raise UserError("calibration: no development rows to fit on")
    best = None
    for w in (0.0, 1.0):
        shifted = raw - w * prior

        def loss(x, shifted=shifted):
            return log_loss(shifted * x[0] + x[1:], y) + ridge * (x[1:] ** 2).sum()

        start = np.r_[1.0, np.zeros(raw.shape[1])]
        fit = minimize(loss, start, bounds=[(1e-3, 1e3)] + [(None, None)] * raw.shape[1])
        if best is None or fit.fun < best[0]:
            b = fit.x[1:] - fit.x[1:].mean()
            best = fit.fun, Calibration(w, tuple(float(v) for v in b / fit.x[0]), float(1 / fit.x[0]), True)
    return best[1]


def fit_and_save(folder, task, raw, prior, y):
    """fit_calibration, kept in `folder` with the development log-loss of raw, null and fitted scores."""
    fit = fit_calibration(raw, prior, y)
    losses = {"raw": log_loss(raw, y), "null": log_loss(raw - prior, y), "fitted": log_loss(fit(raw, prior), y)}
    fit.save(folder, task, dev_rows=len(y), dev_log_loss=losses)
    return fit
