"""Samples of a code model: a few for one prompt, or many in a file that a stopped run continues."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from common import SEED, prompt_ids
from distill.files import ResumableJsonl, UserError, between, sha256
from distill.model.generate import Reply, context_length, generate
from distill.model.hub import adapter_sha256
from distill.tasks.codegen_reply import TokenStream, extract_code
from distill.tasks.codegen_tasks import code_prompt, plan_prompt
from distill.tasks.endpoint import Endpoint

PLAN_TOKENS = 160  # a plan is a few lines; what is longer rambles
PLANS_AHEAD = 32  # batches whose plans are written before their code: a stopped run loses no more


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. temperature: 0 is greedy. max_new_tokens: of a reply. batch_size: sequences at once."""

    n: int = 1
    temperature: float = 0.0
    seed: int = SEED
    max_new_tokens: int = 384
    batch_size: int = 16
    plan_then_code: bool = False

    def __post_init__(self):
        for name in ("n", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        greedy = self.temperature == 0
        if not (greedy or 0.01 <= self.temperature <= 100) or (self.n > 1 and greedy):
            raise UserError(
                f"--temperature {self.temperature:g} with --n {self.n}: expected 0.01 to 100, or 0 for one sample"
            )

    @classmethod
    def of(cls, args: argparse.Namespace, plan_then_code: bool = False) -> "Sampling":
        """From the flags of add_sampling_arguments()."""
        temperature = (0.8 if args.n > 1 else 0.0) if args.temperature is None else args.temperature
        return cls(args.n, temperature, args.seed, args.max_new_tokens, args.batch_size, plan_then_code)


def add_sampling_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that infer_codegen.py and eval_codegen.py share."""
    p.add_argument("--n", type=int, default=1, help="samples per prompt (default 1); time grows with it")
    p.add_argument("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.8 for several)")
    p.add_argument("--seed", type=between(int, 0, 2**32 - 1), default=SEED, help=f"of the sampling (default {SEED})")
    p.add_argument(
        "--max_new_tokens", type=int, default=384, help="of a reply (default 384); the longest sets the time"
    )
    p.add_argument("--batch_size", type=int, default=16, help="samples at once (default 16); memory grows with it")


def prompt_limit(model, max_new_tokens: int) -> int:
    """Tokens that a prompt may have. Error: UserError where nothing is left for one."""
    context = context_length(model)
    if max_new_tokens >= context:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: expected less than the model's context of {context} tokens"
        )
    return context - max_new_tokens


def sample(
    model: PreTrainedModel | Endpoint,
    tokenizer,
    requests: list[str],
    samples: list[int],
    sampling: Sampling,
    *,
    plan_stream: TokenStream | None = None,
    reply_stream: TokenStream | None = None,
    on_row: Callable[[int, dict], None] | None = None,
) -> list[dict]:
    """One sample per request: [{"plan", "code", "reply", "tokens", "seconds"}]; plan is None if direct.

    model: an Endpoint draws its own random numbers, shows no tokens as they come, and needs no tokenizer.
    samples: the number of each sample among those of its request, on which its random numbers depend.
    plan_stream, reply_stream: show a single request's tokens as they come. on_row(i, row): called for each row as it
    comes. seconds: since the row before it.
    """
    rows, last = {}, time.perf_counter()
    if not isinstance(model, Endpoint):
        prompt_limit(model, sampling.max_new_tokens)

    def ask(messages, max_new_tokens, phase, stream, on_reply=None):
        keys = zip(requests, samples, strict=True)
        options = {
            "batch_size": sampling.batch_size,
            "temperature": sampling.temperature,
            "seed": [int(sha256(f"{sampling.seed}:{phase}:{k}:{request}")[:12], 16) for request, k in keys],
            "on_reply": on_reply,
        }
        if isinstance(model, Endpoint):
            return model.replies(messages, max_new_tokens, **options)
        on_token = stream and (lambda i, k, token: stream(token))
        ids = prompt_ids(tokenizer, messages)
        replies = generate(model, tokenizer, ids, max_new_tokens, on_token=on_token, **options)
        if stream:
            stream.end()
        return replies

    plans = [None] * len(requests)
    if sampling.plan_then_code:
        most = min(PLAN_TOKENS, sampling.max_new_tokens)
        plans = [r for (r,) in ask([plan_prompt(p) for p in requests], most, "plan", plan_stream)]

    def keep(i, _, reply: Reply):
        nonlocal last
        now, plan = time.perf_counter(), plans[i]
        rows[i] = {
            "plan": plan and plan.text,
            "code": extract_code(reply.text),
            "reply": reply.text,
            "tokens": len(reply.tokens) + (len(plan.tokens) if plan else 0),
            "seconds": round(now - last, 4),
        }
        last = now
        if on_row:
            on_row(i, rows[i])

    messages = [code_prompt(p, plan and plan.text) for p, plan in zip(requests, plans, strict=True)]
    ask(messages, sampling.max_new_tokens, "code", reply_stream, keep)
    return [rows[i] for i in range(len(requests))]


def sample_to_file(
    model: PreTrainedModel | Endpoint,
    tokenizer,
    name: str,
    requests: list[str],
    path: Path,
    sampling: Sampling,
    desc: str,
) -> list[dict]:
    """sampling.n samples of every request as JSONL rows {"index", "sample", ...sample()}; returns the rows.

    Each row is written as it comes and has its own random numbers, so a stopped run continues where it was and ends
    with the samples of a run that was not stopped. A prompt that exceeds the context becomes a row with "error" and no
    code. Error: UserError when the file was made with other settings.
    """
    settings = asdict(sampling)
    del settings["batch_size"]  # samples do not depend on it
    head = {"model": str(name), "adapter": adapter_sha256(name), **settings, "prompts": sha256(json.dumps(requests))}
    plan = (PLAN_TOKENS + 32) * sampling.plan_then_code  # a plan may come back from text as a few tokens more
    over = []
    if not isinstance(model, Endpoint):  # which refuses by itself what it cannot read
        ask = [code_prompt(p, "" if plan else None) for p in requests]
        most = prompt_limit(model, sampling.max_new_tokens)
        over = [i for i, ids in enumerate(prompt_ids(tokenizer, ask)) if len(ids) + plan > most]
    jobs = [(i, k) for i in range(len(requests)) if i not in over for k in range(sampling.n)]
    done = ResumableJsonl(path, head)
    known = {(row["index"], row["sample"]) for row in done.rows}
    left = [job for job in jobs if job not in known]
    chunk = PLANS_AHEAD * sampling.batch_size if plan else max(1, len(left))
    with tqdm(total=len(jobs), initial=len(known), desc=desc) as bar:
        for start in range(0, len(left), chunk):
            part = left[start : start + chunk]

            def keep(i, row, part=part):
                done.append({"index": part[i][0], "sample": part[i][1], **row})
                bar.update()

            sample(model, tokenizer, [requests[i] for i, _ in part], [k for _, k in part], sampling, on_row=keep)
    over = [{"index": i, "sample": k, "error": "prompt over the context"} for i in over for k in range(sampling.n)]
    return sorted(done.rows + over, key=lambda row: (row["index"], row["sample"]))
