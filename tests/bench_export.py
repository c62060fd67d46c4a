"""Generation in llama.cpp against our own scripts: the embedded student in q8_0, one stream, in one run.

    .venv-extra/bin/python tests/bench_export.py            # after `make test-extra`, which installs llama.cpp

Both continue the same prompt greedily by as many tokens, on as many threads (OMP_NUM_THREADS, else all cores), in
turns; the ratio is that of the medians, prompt and HTTP included. Exit code 1 below the bar of 3.5.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import load_model, prompt_ids
from distill.export.gguf_file import write_gguf
from distill.export.llama_cpp import LlamaCpp, installed
from distill.files import UserError, cli, positive
from distill.model.generate import generate
from distill.model.hub import EMBEDDED, embedded_student
from distill.tasks.codegen_tasks import code_prompt

BAR = 3.5


def timed(generate):
    """Tokens per second of generate() -> number of tokens."""
    start = time.perf_counter()
    tokens = generate()
    return tokens / (time.perf_counter() - start)


def main(args):
    if not installed():
        raise UserError("xllamacpp is not installed; expected `pip install -r requirements-export.txt`")
    prompt = code_prompt("Write a function that returns the n-th Fibonacci number, with its docstring and tests.")
    model, tokenizer = load_model(EMBEDDED)
    ids = prompt_ids(tokenizer, [prompt])[0]
    speeds = {"our scripts": [], "llama.cpp, q8_0": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student-q8_0.gguf"
        write_gguf(embedded_student(), tokenizer, path, "q8_0", EMBEDDED)
        with LlamaCpp(path, 2048) as engine:
            for turn in range(args.turns + 1):
                ours = timed(lambda: len(generate(model, tokenizer, [ids], args.tokens)[0][0].tokens))
                theirs = timed(lambda: len(engine.generate(ids, args.tokens)))
                if turn:  # the first one warms up
                    speeds["our scripts"].append(ours)
                    speeds["llama.cpp, q8_0"].append(theirs)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        print(f"{name:18} {median:6.1f} tokens/s (of {', '.join(f'{v:.1f}' for v in speeds[name])})")
    ratio = medians["llama.cpp, q8_0"] / medians["our scripts"]
    print(f"ratio {ratio:.2f}; the bar is {BAR}")
    return ratio


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=positive(int), default=128, help="to generate at most (default 128)")
    p.add_argument("--turns", type=positive(int), default=3, help="measured turns after a warm one (default 3)")
    sys.exit(cli(main, p) < BAR)
