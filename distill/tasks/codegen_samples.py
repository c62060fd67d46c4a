"""Samples of a code model: one batch, or many into a file that a stopped run goes on with."""

import json
import time

from common import SEED, prompt_ids
from distill.files import ResumableJsonl, UserError, between, sha256
from distill.model.hub import adapter_sha256
from distill.tasks.codegen_reply import extract_code
from distill.tasks.codegen_tasks import code_prompt, plan_prompt

PLAN_TOKENS = 160  # a plan is a few lines; what is longer rambles


def reply_to(model, tokenizer, messages, max_new_tokens, temperature, streamer=None):
    """Replies to a batch of user messages, each cut at the end of its turn: list[str] -> [(text, tokens)].

    temperature 0 is greedy. Raises UserError when a prompt and max_new_tokens exceed the model's context.
    """
    ids = prompt_ids(tokenizer, messages)
    longest, most = max(map(len, ids)), room(model, max_new_tokens)
    if longest > most:
        raise UserError(
            f"prompt of {longest} tokens: expected at most {most}, the context less {max_new_tokens} new ones"
        )
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    # the checkpoint's generation config may bring a repetition penalty, top-k or further ends; only the ends are kept
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(
        **batch,
        **sampling,
        top_k=0 if temperature else None,
        top_p=1.0 if temperature else None,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    replies = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        replies.append((tokenizer.decode(row[:end], skip_special_tokens=True), end))
    return replies


def room(model, max_new_tokens):
    """Tokens a prompt may have. Error: UserError where nothing is left for one."""
    context = model.config.max_position_embeddings
    if max_new_tokens >= context:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: expected less than the model's context of {context} tokens"
        )
    return context - max_new_tokens


def sample(model, tokenizer, prompts, args, streamers=(None, None)):
    """One sample a prompt, in one batch: [{"plan", "code", "reply", "tokens", "seconds"}]; plan is None if direct.

    streamers: of the plan and of the reply with the code.
    """
    start, plans = time.perf_counter(), [(None, 0)] * len(prompts)
    if args.plan_then_code:
        messages = [plan_prompt(p) for p in prompts]
        most = min(PLAN_TOKENS, args.max_new_tokens)
        plans = reply_to(model, tokenizer, messages, most, args.temperature, streamers[0])
    messages = [code_prompt(p, plan) for p, (plan, _) in zip(prompts, plans, strict=True)]
    replies = reply_to(model, tokenizer, messages, args.max_new_tokens, args.temperature, streamers[1])
    seconds = round((time.perf_counter() - start) / len(prompts), 3)
    return [
        {"plan": plan, "code": extract_code(reply), "reply": reply, "tokens": used + n, "seconds": seconds}
        for (plan, used), (reply, n) in zip(plans, replies, strict=True)
    ]


def sample_to_file(model, tokenizer, name, prompts, path, args, desc):
    """args.n samples of every prompt, in batches, as JSONL rows {"index", "sample", ...sample()}; returns the rows.

    The file grows by whole batches and each batch has its own seed, so a run that was stopped goes on where it was
    and ends with what it would have ended with. A prompt over the context becomes a row with "error" and no code.
    Error: UserError when the file was made with other settings.
    """
    import torch
    from tqdm import tqdm

    names = ("plan_then_code", "n", "temperature", "seed", "max_new_tokens", "batch_size")
    head = {"model": str(name), "adapter": adapter_sha256(name)}
    head |= {n: getattr(args, n) for n in names} | {"prompts": sha256(json.dumps(prompts))}
    plan = (PLAN_TOKENS + 32) * args.plan_then_code  # a plan may come back from text as a few tokens more
    ask = [code_prompt(p, "" if plan else None) for p in prompts]
    lengths = [len(ids) + plan for ids in prompt_ids(tokenizer, ask)]
    most = room(model, args.max_new_tokens)
    fit = sorted((i for i in range(len(prompts)) if lengths[i] <= most), key=lambda i: -lengths[i])  # longest first
    jobs = [(i, k) for i in fit for k in range(args.n)]
    done = open_samples(path, head, args.batch_size, len(jobs))
    with tqdm(total=len(jobs), initial=len(done.rows), desc=desc) as bar:
        for start in range(len(done.rows), len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            torch.manual_seed(args.seed + start)
            new = sample(model, tokenizer, [prompts[i] for i, _ in batch], args)
            done.append(*({"index": i, "sample": k, **row} for (i, k), row in zip(batch, new, strict=True)))
            bar.update(len(batch))
    long = [i for i in range(len(prompts)) if lengths[i] > most]
    over = [{"index": i, "sample": k, "error": "prompt over the context"} for i in long for k in range(args.n)]
    return sorted(done.rows + over, key=lambda row: (row["index"], row["sample"]))


def open_samples(path, head, batch_size, total):
    """The file of samples, cut to the whole batches that an earlier run left in it."""
    samples = ResumableJsonl(path, head)
    if len(samples.rows) < total:
        samples.truncate(len(samples.rows) // batch_size * batch_size)
    return samples


def check_sampling(args):
    """The flags of add_sampling_arguments(); sets the default temperature."""
    for name in ("n", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.temperature is None:
        args.temperature = 0.8 if args.n > 1 else 0.0
    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100) or (args.n > 1 and args.temperature == 0):
        raise UserError(
            f"--temperature {args.temperature:g} with --n {args.n}: expected 0.01 to 100, or 0 for one sample"
        )


def add_sampling_arguments(p):
    """The flags that eval_codegen.py shares."""
    p.add_argument("--n", type=int, default=1, help="samples a prompt (default 1); time grows with it")
    p.add_argument("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.8 for several)")
    p.add_argument("--seed", type=between(int, 0, 2**32 - 1), default=SEED, help=f"of the sampling (default {SEED})")
    p.add_argument(
        "--max_new_tokens", type=int, default=384, help="of a reply (default 384); the longest sets the time"
    )
    p.add_argument("--batch_size", type=int, default=16, help="prompts at a time (default 16); memory grows with it")
