"""What every stage shares: task, split, prompts, model loading, label scorer, calibration.

This is not a script; the README lists the stages.
"""

import logging
import os
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal
from unicodedata import normalize

from pydantic import Field
from safetensors import SafetensorError

from distill.files import (
    FilledText,
    StrictModel,
    Text,
    UserError,
    one_line,
    parse_json,
    read_json,
    sha256,
    validate,
    write_json,
)
from distill.hardware import cap_memory, choose_precision, device, device_key, room, weight_bytes
from distill.model.chat_template import chat_text, end_of_turn
from distill.model.hub import adapter_base, base_config, base_mismatches, base_record
from distill.model.label_forward import LabelForward, batches, shared_prefix, token_budget
from distill.model.label_trie import LabelTrie

# transformers triggers this warning itself
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
# PEFT looks on the hub for a student that came as a package or a folder, and warns that it is missing
warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file in")
# bitsandbytes asks for a package that would fetch its CPU kernel from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
VAL_FRAC = 0.35  # share of customers held out: 1,500 rows in the smallest class of the public data
SEED = 42


# ---------------------------------------------------------------------------------------------------------------------
# The task: labels, the instruction around the input, content-free inputs


class TaskFile(StrictModel):
    name: FilledText
    labels: list[FilledText] = Field(min_length=2)
    template: FilledText
    null_inputs: list[Text] = Field(min_length=1)
    columns: dict[Literal["text", "label", "group"], FilledText] = Field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A label task as data (data/creditmix_task.json); it travels with the adapter as task.json.

    template: the whole user message, with {input} where the row's text goes. Put the constant text before it:
              the scorer computes that prefix once.
    null_inputs: content-free inputs whose mean score is the model's prior (Zhao et al. 2021).
    columns: where the rows of this task have text, label and group; without it question, answer and group.
    """

    name: str
    labels: tuple
    template: str
    null_inputs: tuple
    columns: dict = field(default_factory=dict, compare=False)

    @classmethod
    def load(cls, path):
        return cls.parse(path, read_json(path))

    @classmethod
    def parse(cls, path, fields):
        """The task of a file's fields. Error: UserError naming `path` and the field."""
        task = validate(path, fields, TaskFile)
        labels = task.labels
        if len({normalize("NFC", label) for label in labels}) < len(labels) or any(
            [label] != label.strip().splitlines() for label in labels
        ):
            raise UserError(
                f"{path}: field 'labels': expected different labels of one line without surrounding white space"
            )
        if task.template.count("{input}") != 1:
            raise UserError(f"{path}: field 'template': expected {{input}} exactly once")
        if task.columns and ("text" not in task.columns or len({*task.columns.values()}) < len(task.columns)):
            raise UserError(f"{path}: field 'columns': expected one for the text, and different ones")
        return cls(task.name, tuple(labels), task.template, tuple(task.null_inputs), task.columns)

    @classmethod
    def of(cls, model_dir, otherwise):
        """The task that travels with an adapter, else the one in the file `otherwise`."""
        own = Path(model_dir) / "task.json"
        return cls.load(own if own.is_file() else otherwise)

    def save(self, path):
        write_json(path, {name: value for name, value in asdict(self).items() if value})

    def prompt(self, text):
        """The user message for one input. Nothing else builds it."""
        return self.template.replace("{input}", text)

    def null_prompts(self):
        return [self.prompt(text) for text in self.null_inputs]


def label_classes(path, rows, field, task, unknown=()):
    """Class numbers [N] of rows[field] in the task's order, -1 for values in `unknown`.

    Error: UserError naming the row whose value is not a label.
    """
    import numpy as np

    number = dict.fromkeys(unknown, -1) | {label: i for i, label in enumerate(task.labels)}
    values = [row.get(field) for row in rows]
    for i, value in enumerate(values, 1):
        if value not in number:
            raise UserError(f"{path}: row {i}: field '{field}': {value!r} is no label; expected {task.labels}")
    return np.array([number[value] for value in values], dtype=int)


# ---------------------------------------------------------------------------------------------------------------------
# The split: by customer, the same in every stage, determined by the file and the seed alone


def unit_hash(seed, key):
    """A number in [0, 1) that depends on seed and key alone."""
    return int(sha256(f"{seed}:{key}")[:13], 16) / 16**13


def prompt_of(row):
    """The user message of a training row of any route."""
    return row.get("input") or row["prompt"]


def row_hash(prompt):
    """A hash that a training run records for each row and an evaluation checks its own rows against."""
    return sha256(prompt)[:16]


def group_hash(group):
    """The customer's hash in prepared rows: it keeps a customer's rows together without saying who it is."""
    return sha256(group)[:12]


def holdout(rows, seed=SEED, frac=VAL_FRAC, start=0.0):
    """Split rows (dicts with a "group") into (training, held out) so that no group is on both sides.

    Held out are the groups whose hash lies in [start, start + frac). A smaller `frac` holds out a subset of
    what a larger one does, so evaluating on fewer rows than were held out is safe. With frac 0.5, start 0 and start 0.5
    give the two halves.
    """
    held = [start <= unit_hash(f"holdout:{seed}", r["group"]) < start + frac for r in rows]
    return [r for r, h in zip(rows, held, strict=True) if not h], [r for r, h in zip(rows, held, strict=True) if h]


def dev_split(rows, seed=SEED, frac=0.1, limit=None):
    """Split training rows into (train, development) by their "group", else by prompt; answers play no part.

    Development rows belong to training: they choose the checkpoint and fit the calibration.
    limit: keep at most this many development rows; the seed determines which ones, and their order.
    """
    dev = [unit_hash(f"dev:{seed}", r.get("group") or prompt_of(r)) < frac for r in rows]
    train, own = ([r for r, d in zip(rows, dev, strict=True) if d == side] for side in (False, True))
    return train, sorted(own, key=lambda r: unit_hash(seed, prompt_of(r)))[:limit] if limit else own


# ---------------------------------------------------------------------------------------------------------------------
# The prompt, as trained and as scored


def prompt_ids(tokenizer, prompts):
    """Token ids of each user message up to the assistant's turn: list[str] -> list[list[int]]."""
    texts = [chat_text(tokenizer, p) for p in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def completion_ids(tokenizer, prompts, answers, begins=None):
    """Token ids of each answer after its prompt, the end of the turn included: list[str] x 2 -> list[list[int]].

    begins: prompt_ids(tokenizer, prompts), if already computed.
    Errors: UserError if prompt and answer do not meet at a token boundary, since training and scoring would then see
    different tokens, and for an answer that contains the end of a turn, since what follows it would never be learned.
    """
    whole = [chat_text(tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
    whole = tokenizer(whole, add_special_tokens=False)["input_ids"] if whole else []
    begins, out = begins or prompt_ids(tokenizer, prompts), []
    for user, prompt, ids, answer in zip(prompts, begins, whole, answers, strict=True):
        tail = ids[len(prompt) :]
        end = tokenizer.eos_token_id if tokenizer.eos_token_id in tail else end_of_turn(tokenizer)
        if ids[: len(prompt)] != prompt or end not in tail:
            raise UserError(f"answer {answer[:40]!r}: the chat template does not put it after the prompt and end it")
        token = tokenizer.convert_ids_to_tokens(end)
        if token in answer:
            raise UserError(
                f"answer {answer[:40]!r} to {user[:40]!r}: contains {token}, the end of a turn; expected none in it"
            )
        # what some templates put after the end of the turn (a line break) is never generated
        out.append(tail[: tail.index(end) + 1])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Loading models


def load_base(name: str | Path, precision: str = "auto", base: tuple | None = None, offload_folder: str | None = None):
    """(model, tokenizer) from a hub id, a local folder or the embedded student, in eval mode.

    Attention uses sdpa, transformers' default, where the architecture supports it.

    precision: auto, nf4 (QLoRA: double quantisation, bf16 compute), bf16 or fp32. base: base_config(name), if known.
    offload_folder: layers that do not fit the GPU wait in RAM, then in this folder, in 16 bits, since bitsandbytes
    keeps 4-bit layers on the GPU. A model whose 4-bit weights fit stays in 4 bits.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path, config, tokenizer = base or base_config(name)
    asked, (precision, why) = precision, choose_precision(config, precision)
    if offload_folder and precision == "nf4":
        needed, free = weight_bytes(config, "nf4"), sum(n for where, n in room().items() if where == device_key())
        if needed <= free:
            print(f"{name}: {needed / 2**30:.1f} GiB in 4 bits fit: OFFLOAD_FOLDER is not used", file=sys.stderr)
            offload_folder = None
        elif asked == "nf4":
            raise UserError(
                f"{name}: {needed / 2**30:.1f} GiB in 4 bits do not fit {free / 2**30:.1f} GiB, and OFFLOAD_FOLDER "
                "takes no 4-bit layers; expected --precision bf16"
            )
        else:
            precision, why = "bf16", "layers in OFFLOAD_FOLDER cannot be in 4 bits"
    print(f"{name}: {precision} on {device()} ({why})", file=sys.stderr)
    kwargs = {"dtype": torch.float32 if precision == "fp32" else torch.bfloat16}
    if precision == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if precision == "nf4" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # FSDP shards only parameters of one dtype together
        kwargs["quantization_config"].bnb_4bit_quant_storage = torch.bfloat16
    kwargs["device_map"] = {"": device()}
    if offload_folder:
        kwargs |= {"device_map": "auto", "offload_folder": offload_folder, "max_memory": room()}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"{name}: its weights do not load: {one_line(e)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.name_or_path = model.config.name_or_path = str(name)  # what PEFT writes into an adapter
    model.precision, model.base_record = precision, base_record(name, path, config, tokenizer)
    return model, tokenizer


def load_model(name_or_dir: str | Path, precision: str = "auto", max_vram_gb: float | None = None):
    """(model, tokenizer) for inference, from a hub id, local folder, the embedded student, or an adapter and its base.

    precision: as load_base. max_vram_gb: GiB that torch may reserve on the GPU; by default all, or less under WSL2.
    """
    from distill.model.fused_lora import fuse_norms

    cap_memory(max_vram_gb)
    adapter = (Path(name_or_dir) / "adapter_config.json").is_file()
    name = adapter_base(name_or_dir) if adapter else name_or_dir
    model, tokenizer = load_base(name, precision, offload_folder=os.environ.get("OFFLOAD_FOLDER"))
    fuse_norms(model)
    if not adapter:
        return model, tokenizer
    for mismatch in base_mismatches(name_or_dir, model.precision, model.base_record):
        print(f"warning: {name_or_dir}: {mismatch}", file=sys.stderr)
    return add_adapter(model, name_or_dir), tokenizer


def add_adapter(model, folder: str | Path, name: str = "default", trainable: bool = False):
    """The base model with one more adapter from `folder`; UserError if it does not fit or load."""
    from peft import PeftModel
    from safetensors.torch import load_file

    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            base, places = model, model.__dict__.pop("hf_device_map", None)  # PEFT would move offloaded layers by it
            model = PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=trainable)
            model.precision, model.base_record = base.precision, base.base_record
            if places:
                base.hf_device_map = places
        if any(p.is_meta for p in model.parameters()):
            # PEFT puts an adapter on its layer's device, here meta; it belongs on the device that computes the layer
            weights = load_file(Path(folder) / "adapter_model.safetensors", str(device()))
            state = {re.sub(r"(lora_[AB])\.weight$", rf"\1.{name}.weight", k): v.float() for k, v in weights.items()}
            model.load_state_dict(state, strict=False, assign=True)
    except (RuntimeError, ValueError, TypeError, LookupError, SafetensorError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{folder}: does not load on {model.config.name_or_path}: {reason}") from None
    if not trainable:  # as they are computed: in fp32 three adapters of rank 16 on a 3B model take 0.2 GiB more
        for key, p in model.named_parameters():
            if re.search(rf"lora_[AB]\.{re.escape(name)}\.", key):
                p.data = p.data.to(model.get_input_embeddings().weight.dtype)
    # PEFT leaves a missing matrix at its initial zero, so the base model alone would answer (peft#2699)
    zero = [n for n, p in model.named_parameters() if f"lora_B.{name}." in n and not p.any()]
    if zero:
        raise UserError(f"{folder}: {len(zero)} matrices are missing or zero on this base, for example {zero[0]}")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The label scorer


def label_trie(tokenizer, labels, prompt="x"):
    """The LabelTrie of the labels, tokenized as they follow a prompt.

    If one label's tokens are a prefix of another's, the end of the turn is scored too, for all labels.
    Errors: UserError as completion_ids, and for two labels of the same tokens.
    """
    ids = completion_ids(tokenizer, [prompt] * len(labels), list(labels))
    for i, own in enumerate(ids):
        if (first := ids.index(own)) < i:
            raise UserError(f"{labels[i]!r} has the same tokens as {labels[first]!r}; expected labels that differ")
    bare = [i[:-1] for i in ids]
    nested = any(a is not b and a == b[: len(a)] for a in bare for b in bare)
    return LabelTrie(ids if nested else bare)


class LabelScorer:
    """Scores of all labels in one forward pass per batch of prompts; the prompts' shared prefix is computed once.

    prefix_prompts: two or more user messages whose common beginning is that prefix (Task.null_prompts()); without them
    each prompt is computed whole. A scorer belongs to one state of the weights: make a new one after training.
    """

    def __init__(self, model, tokenizer, labels, prefix_prompts=()):
        self.model, self.tokenizer, self.labels = model, tokenizer, tuple(labels)
        self.trie = label_trie(tokenizer, self.labels)
        prefix = shared_prefix(prompt_ids(tokenizer, prefix_prompts)) if len(set(prefix_prompts)) > 1 else []
        self.forward = LabelForward(model, self.trie, tokenizer.pad_token_id, prefix)

    def score(self, prompts, adapters=None, progress=False):
        """Length-normalised log-likelihoods, float array [N, L], of user messages (list[str]).

        adapters: one adapter name per prompt ("__base__" for none); rows of one batch may differ.
        Error: UserError for a prompt longer than the model's context.
        """
        return self.score_ids(prompt_ids(self.tokenizer, prompts), adapters, progress)

    def score_ids(self, ids, adapters=None, progress=False):
        """Like `score`, from token ids (prompt_ids) in place of messages."""
        import numpy as np
        from tqdm import tqdm

        limit = getattr(self.model.config, "max_position_embeddings", 2**31) - len(self.trie.nodes)
        for i, row in enumerate(ids):
            if len(row) > limit:
                raise UserError(f"prompt {i + 1}: {len(row)} tokens; expected at most {limit}")
        out = np.zeros((len(ids), len(self.labels)))
        bar = tqdm(total=len(ids), desc="scoring", unit="row", disable=not progress, file=sys.stderr)
        for rows in batches([len(row) for row in ids], token_budget(self.model.device)):
            own = [adapters[i] for i in rows] if adapters else None
            out[rows] = self.forward.scores([ids[i] for i in rows], own).cpu().numpy()
            bar.update(len(rows))
        bar.close()
        return out

    def prior(self, task):
        """The model's bias without content, float array [L]: the mean score of the task's content-free prompts."""
        return self.score(task.null_prompts()).mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


Number = Annotated[float, Field(gt=-1e6, lt=1e6)]


class CalibrationFile(StrictModel):
    w: Number
    b: dict[str, Number]
    T: float = Field(gt=0, lt=1e6)


@dataclass(frozen=True)
class Calibration:
    """calibrated = (raw - w * prior + b) / T; unfitted, multi-null calibration as published (arXiv 2511.14385).

    Chosen on development rows (distill/calibrate.py) and kept in calibration.json beside the adapter.
    """

    w: float = 1.0
    b: tuple = ()  # one per label, in the task's order; none means 0
    T: float = 1.0
    fitted: bool = False
    class_shares: tuple = ()  # class mix that it answers for, in the task's order; none means equal shares
    natural_shares: tuple = ()  # class mix before the training rows were balanced; none means unknown

    def __call__(self, raw, prior):
        """Calibrated scores [N, L] from raw [N, L] and prior [L]; their softmax is a probability once T is fitted."""
        return (raw - self.w * prior + (self.b or 0.0)) / self.T

    def for_prior(self, target, task):
        """The same calibration for another class mix: scores gain log(target / class_shares) (Saerens et al. 2002).

        target: None (no change), "natural", "balanced", a JSON object {label: share}, or a file that holds one.
        Error: UserError for "natural" where it is unknown, and for what is not one positive share per label.
        """
        import numpy as np

        if target is None:
            return self
        equal = (1 / len(task.labels),) * len(task.labels)
        if target == "natural" and not self.natural_shares:
            raise UserError(
                "class prior natural: calibration.json does not record it; expected balanced, a JSON object or a file"
            )
        named = {"natural": self.natural_shares, "balanced": equal}
        shares = named[target] if target in named else read_shares(target, task)
        shift = np.log(shares) - np.log(self.class_shares or equal)
        b = tuple((np.array(self.b or np.zeros(len(shares))) + self.T * shift).tolist())
        return replace(self, b=b, class_shares=tuple(shares))

    def save(self, folder, task, **record):
        """record: how it was chosen (rows, log-loss of each choice)."""

        def by_label(values):
            return dict(zip(task.labels, values, strict=True))

        known = {k: by_label(v) for k in ("class_shares", "natural_shares") if (v := getattr(self, k))}
        d = {"w": self.w, "b": by_label(self.b), "T": self.T, **known, **record}
        write_json(Path(folder) / "calibration.json", d)

    @classmethod
    def load(cls, folder, task):
        """What calibration.json beside an adapter holds, or the unfitted default where there is none."""
        path = Path(folder) / "calibration.json"
        if not path.is_file():
            return cls()
        d = read_json(path)
        fit = validate(path, d, CalibrationFile)
        if set(fit.b) != set(task.labels):
            raise UserError(f"{path}: field 'b': expected one number for each of {task.labels}")
        b = tuple(fit.b[label] for label in task.labels)
        mixes = {k: shares_of(f"{path}: field '{k}'", d[k], task) for k in ("class_shares", "natural_shares") if k in d}
        return cls(fit.w, b, fit.T, True, **mixes)


def read_shares(target, task):
    """Class shares in the task's order: of a JSON object or file {label: share}, or of a NAME_split.json of prepare."""
    d = parse_json(target, "class prior") if target.lstrip().startswith("{") else read_json(target)
    return shares_of("class prior", d.get("natural_shares", d) if isinstance(d, dict) else d, task)


def shares_of(place, d, task):
    """{label: number above 0} -> shares in the task's order. Error: UserError beginning with `place`."""
    good = isinstance(d, dict) and set(d) == set(task.labels)
    if not good or not all(isinstance(v, int | float) and 0 < v < float("inf") for v in d.values()):
        raise UserError(f"{place}: expected an object with a number above 0 for each of {task.labels}")
    return tuple(d[label] / sum(d.values()) for label in task.labels)


def log_loss(scores, y, weights=None):
    """Mean negative log-likelihood of the true classes y [N] under softmax(scores [N, L]); weights [N] of the rows."""
    import numpy as np
    from scipy.special import log_softmax

    return float(-np.average(log_softmax(scores, axis=1)[range(len(y)), y], weights=weights))


def answers(task, raw, prior, calibration, model_name):
    """What infer prints and the server answers for each row of raw [N, L]: a list of dicts of plain numbers."""
    from scipy.special import softmax

    scores = calibration(raw, prior)
    out = []
    for row, score, p in zip(raw, scores, softmax(scores, axis=1), strict=True):
        top = sorted(score, reverse=True)
        out.append(
            {
                "model_name": model_name,
                "prediction": task.labels[int(score.argmax())],
                "scores": dict(zip(task.labels, score.tolist(), strict=True)),
                "raw_scores": dict(zip(task.labels, row.tolist(), strict=True)),
                "prior": dict(zip(task.labels, prior.tolist(), strict=True)),
                "probabilities": dict(zip(task.labels, p.tolist(), strict=True)),
                "top2_margin": float(top[0] - top[1]),
            }
        )
    return out
