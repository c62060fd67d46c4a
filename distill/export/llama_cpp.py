"""A real llama.cpp on loopback: the server inside the optional package xllamacpp (requirements-export.txt).

    python -m distill.export.llama_cpp exports/sft/sft-q8_0.gguf --port 8080    # until Ctrl-C or the end of its input

It runs in a process of its own: a file that llama.cpp does not take may end the process that loads it.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from distill.files import ROOT, UserError, cli
from distill.model.label_trie import LabelTrie

TIMEOUT_S = 900  # of one request; the longest is the prompt of a large model on few cores


class EngineError(Exception):
    """llama.cpp did not load a file or did not answer; the message is one line."""


def installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A client of llama.cpp with one GGUF file loaded; use it in a `with` statement.

    context: tokens of prompt and answer together.

    Raises EngineError where the file does not load or a request fails.
    """

    def __init__(self, path: Path, context: int = 4096):
        self.path, self.context = Path(path), context
        self.listed = 64  # tokens whose log-probabilities the server lists

    def __enter__(self) -> "LlamaCpp":
        self.errors = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "distill.export.llama_cpp", str(self.path.resolve())]
        self.process = subprocess.Popen(
            [*command, "--context", str(self.context)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C is for the caller, which then ends this process
        )
        self.address = self.process.stdout.readline().decode().strip()
        if not self.address.startswith("http"):
            self.__exit__()
            raise EngineError(f"{self.path.name}: llama.cpp does not load it: {self.last_error()}")
        self.letter = self.tokens("a")[0]
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_error(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.process.returncode}"

    def post(self, path: str, body: dict) -> dict:
        """The answer to one request of llama.cpp's server, parsed."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            raise EngineError(
                f"llama.cpp: {path}: status {e.code}: {e.read()[:200].decode(errors='replace')}"
            ) from None
        except (OSError, ValueError) as e:
            raise EngineError(f"llama.cpp: {path}: {e}; {self.last_error()}") from None

    def render(self, prompt: str) -> str:
        """The text that llama.cpp's own template engine makes of one user message."""
        return self.post("/apply-template", {"messages": [{"role": "user", "content": prompt}]})["prompt"]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it included, as llama.cpp's chat endpoint makes them."""
        return self.post("/tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """Greedy token ids after the prompt `ids`, up to and including the end of the turn."""
        body = {"prompt": ids, "n_predict": max_new_tokens, "temperature": 0, "return_tokens": True}
        return self.post("/completion", body)["tokens"]

    def log_probs(self, ids: list[int], wanted: set[int]) -> dict[int, float]:
        """{token: log-probability} of the tokens `wanted` after `ids`.

        The server lists the likeliest tokens, over the whole vocabulary and before any sampler; the list grows until
        it holds all of `wanted`, and keeps its length for the next request. The token that is then sampled is biased
        to a plain letter, for the server keeps back half a character and its probabilities with it.
        """
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "logit_bias": [[self.letter, 1000]]}
        while True:
            answer = self.post("/completion", {**body, "n_probs": self.listed})
            top = answer["completion_probabilities"][0]["top_logprobs"]
            found = {t["id"]: t["logprob"] for t in top}
            missing = wanted - set(found)
            if not missing:
                return {token: found[token] for token in wanted}
            if len(top) < self.listed:
                raise EngineError(f"llama.cpp: no log-probability of token {min(missing)}")
            self.listed *= 2  # not all at once: the whole vocabulary costs some 0.5 s

    def label_scores(self, ids: list[int], trie: LabelTrie) -> list[float]:
        """Length-normalised log-likelihoods of the L labels after `ids`.

        llama.cpp's server does not score a given text, so each node of the trie is a request for the next token.
        """
        paths = [[]]
        for own, parent in trie.nodes:
            paths.append([*paths[parent + 1], *own])
        cells = list(zip(trie.column.tolist(), trie.token.tolist(), trie.weight.tolist(), strict=True))
        cells = [[c for c in zip(*label, strict=True) if c[2]] for label in cells]  # (column, token, weight) each
        log_probs = []
        for column, path in enumerate(paths):
            wanted = {token for label in cells for at, token, _ in label if at == column}
            log_probs.append(self.log_probs(ids + path, wanted))
        return [sum(weight * log_probs[column][token] for column, token, weight in label) for label in cells]

    def json(self, prompt: str, schema: dict, max_new_tokens: int) -> tuple[str, bool]:
        """(text, ended) of a greedy answer under a JSON Schema; ended is False where the budget cut it."""
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "response_format": {"type": "json_schema", "json_schema": {"name": "result", "schema": schema}},
        }
        choice = self.post("/v1/chat/completions", body)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"] == "stop"


def main(args):
    if not args.model.is_file():
        raise UserError(f"{args.model}: no such file; expected a GGUF file")
    if not installed():
        raise UserError("xllamacpp is not installed; expected `pip install -r requirements-export.txt`")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(args.model)
    params.port, params.n_ctx, params.n_parallel, params.verbosity = args.port, args.context, 1, 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until whoever started it is gone


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1 (default: a free one, which it prints)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer together (default 4096)")
    cli(main, parser)
