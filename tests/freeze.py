"""Record what a refactoring must not change, as JSON, and compare two such records.

    python tests/freeze.py before.json                       # at the old commit
    python tests/freeze.py after.json --against before.json  # at the new one: prints differences, exit code 1 if any

It prepares the shipped data, trains a tiny random model for four steps by every route, evaluates, serves and generates
with it, all on the CPU in about four minutes. It runs the scripts as a user does and imports none of the project's
modules, so the same file runs before and after they move. Paths, times, versions, and commits are left out. Floats keep
five digits: they repeat exactly on one machine with the same libraries, not across machines.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNSTABLE = {"command", "commit", "date", "hardware", "peft_version", "python", "versions"}  # besides times and rates
FEATURES = "Age: {}.0, Occupation: Scientist, Annual Income: {}.12, Outstanding Debt: 809.98, Payment Behaviour: Low"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("API_KEY", "DEADLINE", "HOST", "MAX_QUEUE", "RANK", "TASK")},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",  # no bf16 instructions: the scripts choose fp32 on every CPU
}


def script(name, *args, code=0):
    """Run a script in the repository root and return its standard output. Error: RuntimeError for another exit code."""
    command = [sys.executable, name, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=600)
    if done.returncode != code:
        raise RuntimeError(f"{name}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path):
    """The content of a JSON or JSONL file, or None if there is none."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return lines(text) if path.suffix == ".jsonl" else json.loads(text)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def files(folder):
    """Relative names of a folder's files. Those that hold a time or a key in their name are left out."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(n for n in names if not n.startswith(("tensorboard/", ".scores-")))


def scrub(value, work):
    """The value without unstable fields and paths, with floats of five digits."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (k in UNSTABLE or "seconds" in k or k.endswith("_per_s"))}
        return {scrub(k, work): scrub(v, work) for k, v in kept.items()}
    if isinstance(value, list):
        return [scrub(v, work) for v in value]
    if isinstance(value, str):
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", str(work)).strip("_")  # how file names spell the folder
        value = value.replace(str(work), "WORK").replace(name, "WORK").replace(str(ROOT), "ROOT")
        return re.sub(r"\b[\d.]+ s\b", "TIME s", value)
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------------------
# Stages: each returns what it recorded. They run in this order and read what the ones before wrote under `work`.


def student(work):
    """The answer of a shipped adapter, which unpacks the embedded student, and random Llamas with its tokenizer."""
    answer = script("infer_creditmix.py", "--model_dir", "runs/smollm2_sft", "--features", FEATURES.format(23, 19114))
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "runs" / "base" / "smollm2-135m")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for seed, (name, spread) in enumerate({"tiny": 0.02, "teacher": 0.3}.items()):  # the wider, the surer it is
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=spread, **shape, **ids)
        LlamaForCausalLM(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    return {"shipped": json.loads(answer), "tiny": digest(work / "tiny" / "model.safetensors")}


def prepare(work):
    """Hashes of every file that the three prepare scripts write from the shipped data, and of generated data."""
    idp = ["idp_prepare.py", "--schema", "data/idp_schema.json", "--src", "data/idp_corpus.jsonl", "--outdir"]
    script("creditmix_prepare.py", "--src", "data/creditmix_dataset.json", "--outdir", work / "creditmix")
    script(*idp, work / "idp")
    script(*idp, work / "idp_copies", "--copies", 2)
    script("codegen_prepare.py", "--limit", 20, "--out_dir", work / "codegen")
    made = work / "made"
    script("creditmix_prepare.py", "--synthesize", 300, "--outdir", made)
    script(*idp[:3], "--src", made / "corpus.jsonl", "--synthesize", 80, "--outdir", made)
    folders = [work / name for name in ("creditmix", "idp", "idp_copies", "codegen", "made")]
    record = {folder.name: {name: digest(folder / name) for name in files(folder)} for folder in folders}
    return record | {"check": script("creditmix_prepare.py", "--check", made / "creditmix_dataset.json").splitlines()}


def train(work):
    """The adapter folder of a four-step run of every route."""
    task = work / "creditmix" / "creditmix_task.json"
    unlabelled = [
        {k: v for k, v in row.items() if k not in ("teacher_output", "teacher_probs")}
        for row in read(work / "creditmix" / "creditmix_kd.jsonl")[:400]
    ]
    write(work / "unlabelled_kd.jsonl", unlabelled)
    runs = {
        "sft": ["sft_train.py", "creditmix/creditmix_sft.jsonl"],
        "sft_swap_noise": ["sft_train.py", "creditmix/creditmix_sft.jsonl", "--swap_noise", 0.5],
        "sft_nf4": ["sft_train.py", "creditmix/creditmix_sft.jsonl", "--precision", "nf4"],
        "sft_text": ["sft_train.py", "codegen/codegen_sft.jsonl"],
        "kd_text": ["kd_train.py", "codegen/codegen_kd.jsonl"],
        "kd_tokens": ["kd_train.py", "codegen/codegen_kd.jsonl", "--teacher", work / "teacher", "--top_k", 8],
        "kd_labels": ["kd_train.py", "creditmix/creditmix_kd.jsonl", "--alpha", 0.2],
        "kd_boosting": ["kd_train.py", "unlabelled_kd.jsonl", "--task", task, "--teacher", "gradient-boosting"],
        "dpo": ["dpo_train.py", "creditmix/creditmix_dpo.jsonl"],
        "dpo_from_sft": ["dpo_train.py", "creditmix/creditmix_dpo.jsonl", "--init_adapter", work / "sft"],
    }
    common = ["--student", work / "tiny", "--max_steps", 4, "--batch_size", 8, "--lr", 0.01]
    for name, (trainer, data, *more) in runs.items():
        script(trainer, "--data", work / data, "--save_dir", work / name, *common, *more)
    return {name: adapter(work / name) for name in runs}


def adapter(folder):
    """What is stable in an adapter folder: tensors, trained rows, calibration, task, run record, names of files."""
    from safetensors.torch import load_file

    tensors = sorted(load_file(folder / "adapter_model.safetensors").items())
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.float().numpy().tobytes())
    record = {"sha256": hashed.hexdigest(), "tensors": len(tensors)}
    record["norm"] = sum(float(t.double().square().sum()) for _, t in tensors) ** 0.5  # how far apart two hashes are
    names = ("adapter_config.json", "calibration.json", "run.json", "task.json")
    record |= {name: read(folder / name) for name in names}
    record["adapter_config.json"]["target_modules"].sort()  # a set, written in any order
    return record | {"train_rows.txt": digest(folder / "train_rows.txt"), "files": files(folder)}


def evaluate_creditmix(work):
    """Report and predictions of base, SFT and KD, and of a copy of SFT whose calibration is fitted again."""
    shutil.copytree(work / "sft", work / "sft_copy")
    models = [work / name for name in ("tiny", "sft", "kd_labels")]
    script("eval_creditmix.py", "--val_per_class", 20, "--out", work / "eval", "--model_dir", *models)
    fit = ["--fit_calibration", "--label_bias", "Good=0.1"]
    script("eval_creditmix.py", "--val_per_class", 20, "--out", work / "fit", "--model_dir", work / "sft_copy", *fit)
    record = {folder: report(work / folder, "predictions.jsonl") for folder in ("eval", "fit")}
    return record | {"calibration": read(work / "sft_copy" / "calibration.json")}


def report(folder, *names):
    """report.json, the other files named, and the names of all."""
    return {name: read(folder / name) for name in ("report.json", *names)} | {"files": files(folder)}


def infer_creditmix(work):
    """Answers for one row and for a file of rows."""
    rows = [{"question": FEATURES.format(18 + i, i**3), "id": i} for i in range(10)]
    one = script("infer_creditmix.py", "--model_dir", work / "tiny", "--features", rows[3]["question"])
    paths = ["--input", write(work / "rows.jsonl", rows), "--output", work / "answers.jsonl"]
    script("infer_creditmix.py", "--model_dir", work / "sft", *paths)
    return {"one": json.loads(one), "file": read(work / "answers.jsonl")}


def serve(work):
    """Served answers of all four models, single and in a list, /readyz, and the codes of requests that are refused."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folders = {"SFT_DIR": work / "sft", "KD_DIR": work / "kd_labels", "DPO_DIR": work / "dpo_from_sft"}
    env = ENVIRONMENT | {"BASE_MODEL": str(work / "tiny")} | {k: str(v) for k, v in folders.items()}

    def ask(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as e:
            return e.code, json.loads(e.read())
        except OSError:  # it does not listen yet
            return None, None

    with open(work / "server.log", "w") as log:
        command = [sys.executable, "serve_creditmix.py", "--port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while (ready := ask("/readyz"))[0] != 200:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"serve_creditmix.py is not ready: {(work / 'server.log').read_text()[-500:]}")
            time.sleep(0.3)
        texts = [FEATURES.format(18 + i, i**3) for i in range(5)]
        record = {"readyz": ready[1], "paths": sorted(ask("/openapi.json")[1]["paths"])}
        for model in ("base", "sft", "kd", "dpo"):
            record[model] = [ask(f"/infer/{model}", {"features": text}) for text in texts[:2]]
            record[f"{model}_batch"] = ask(f"/infer/{model}/batch", {"features": texts})
        refused = {"unknown model": "/infer/none", "no features": "/infer/sft", "no key": "/admin/reload"}
        return record | {why: ask(path, {})[0] for why, path in refused.items()}
    finally:
        server.terminate()
        server.wait(60)


def idp(work):
    """Extraction from two documents, one of them longer than the context, and an evaluation."""
    documents = [row["document"] for row in read(ROOT / "data" / "idp_corpus.jsonl")[:4]]
    rows = write(work / "documents.jsonl", [{"document": documents[0]}, {"document": "\n".join(documents[1:] * 4)}])
    model = ["--model_dir", work / "tiny", "--schema", "data/idp_schema.json"]
    script("infer_idp.py", *model, "--input", rows, "--output", work / "documents_out.jsonl", "--max_new_tokens", 64)
    more = ["--data", "data/idp_corpus.jsonl", "--limit", 2, "--max_new_tokens", 64, "--out", work / "eval_idp"]
    script("eval_idp.py", *model, *more)
    record = report(work / "eval_idp", "tiny_constrained.jsonl", "tiny_free.jsonl")
    return {"infer": read(work / "documents_out.jsonl"), "eval": record}


def codegen(work):
    """Sampled, greedy, planned and batched replies, an evaluation with its samples, and the reference solutions."""
    model = ["infer_codegen.py", "--model_dir", work / "tiny", "--max_new_tokens", 24]
    one = [*model, "--prompt", "Write add(a, b).", "--json"]
    sampled = ["--n", 2, "--temperature", 0.8, "--seed", 1]
    rows = [{"prompt": "Write one().", "tests": "assert one() == 1"}, {"prompt": "Write two()."}]
    paths = ["--input", write(work / "requests.jsonl", rows), "--output", work / "code.jsonl"]
    ways = {"sampled": sampled, "greedy": [], "plan": ["--plan_then_code", *sampled]}
    record = {way: lines(script(*one, *flags, code=1)) for way, flags in ways.items()}  # 1: no reply holds code
    script(*model, *paths, *sampled)
    out = [
        "--limit",
        2,
        "--n",
        2,
        "--max_new_tokens",
        24,
        "--mode",
        "direct",
        "plan",
        "--out_dir",
        work / "eval_codegen",
    ]
    script("eval_codegen.py", "--model_dir", work / "tiny", *out)
    evaluated = report(work / "eval_codegen", *(n for n in files(work / "eval_codegen") if n.endswith(".jsonl")))
    reference = script("eval_codegen.py", "--reference", "--limit", 5).splitlines()
    return record | {"file": read(work / "code.jsonl"), "eval": evaluated, "reference": reference}


# ---------------------------------------------------------------------------------------------------------------------
# Records


def leaves(value, path=""):
    """{path: value} of everything in a record that holds nothing else."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {}
    for key, child in inner:
        found |= leaves(child, f"{path}/{key}")
    return found or {path: value}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of the record")
    parser.add_argument("--against", type=Path, metavar="BEFORE", help="record to compare with")
    work = Path(tempfile.gettempdir()) / "distill_freeze"
    parser.add_argument("--workdir", type=Path, default=work, help="emptied first (default: %(default)s)")
    args = parser.parse_args()
    before = json.loads(args.against.read_text()) if args.against else None
    lock = open(f"{args.workdir}.lock", "w")  # noqa: SIM115 - held until the end: names must be equal in each run
    fcntl.flock(lock, fcntl.LOCK_EX)
    work = args.workdir.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    record, failed = {}, []
    for stage in (student, prepare, train, evaluate_creditmix, infer_creditmix, serve, idp, codegen):
        start = time.monotonic()
        try:
            record[stage.__name__] = scrub(json.loads(json.dumps(stage(work))), work)
        except Exception as e:  # a later stage may still tell something
            record[stage.__name__] = {"failed": scrub(f"{type(e).__name__}: {e}", work)}
            failed.append(stage.__name__)
            print(f"{stage.__name__} failed: {type(e).__name__}: {e}", file=sys.stderr)
        print(f"{stage.__name__}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if before is None:
        sys.exit(bool(failed))
    old, new = leaves(before), leaves(record)
    differing = [path for path in {**old, **new} if old.get(path, "absent") != new.get(path, "absent")]
    for path in differing:
        print(f"{path}: {old.get(path, 'absent')!r} -> {new.get(path, 'absent')!r}")
    print(f"{len(differing)} of {len({**old, **new})} values differ")
    sys.exit(bool(differing or failed))


if __name__ == "__main__":
    main()
