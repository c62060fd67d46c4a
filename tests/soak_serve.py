"""Overload for minutes: requests arrive at several times what the server can do, and each must get an honest answer.

    python tests/soak_serve.py                          10 minutes at 4x capacity, the embedded student
    python tests/soak_serve.py --base FOLDER --minutes 1

Capacity is measured first, with 64 clients. Then requests for four models arrive on schedule, whatever became of the
earlier ones, a tenth of them from clients that leave at once. At the end: answers by status, answers that differ from
the single-request answer, requests without an answer, latency of the accepted ones against the deadline, memory.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from bench_serve import MODELS, adapters, at_once
from serving import ROOT, Server, rows
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from common import Task
from distill.files import UserError, cli
from distill.model.hub import EMBEDDED

DEADLINE = 10


def main(args):
    task = Task.load(ROOT / "data" / "creditmix_task.json")
    asked = [(MODELS[i % 4], text) for i, text in enumerate(rows(64))]
    with tempfile.TemporaryDirectory() as home:
        folders = adapters(args.base, task, Path(home))
        env = {f"{name.upper()}_DIR": folder for name, folder in folders.items()}
        with Server(home, BASE_MODEL=args.base, DEADLINE=600, **env) as server:
            expected = [server.infer(*one)[1] for one in asked]
            capacity = 64 / at_once(server, asked, 64)[0]
        with Server(home, BASE_MODEL=args.base, DEADLINE=DEADLINE, **env) as server:
            print(f"capacity {capacity:.1f} requests/s; offering {args.factor * capacity:.1f}/s", file=sys.stderr)
            results, memory = asyncio.run(overload(server, asked, args.factor * capacity, 60 * args.minutes))
            after = server.infer(*asked[0])
    statuses = Counter(status for _, status, _, _ in results)
    late = np.array([seconds for _, status, seconds, _ in results if status == 200])
    wrong = sum(not same(expected[i], got) for i, status, _, got in results if status == 200)
    settled = memory[len(memory) // 10 :]  # the first tenth fills caches
    print(f"{args.base}: {args.minutes:g} min at {args.factor:g}x of {capacity:.1f} requests/s, deadline {DEADLINE} s")
    print(f"{len(results)} requests: {dict(statuses.most_common())}; wrong answers {wrong}")
    if len(late):
        p50, p99 = np.percentile(late, (50, 99))
        print(f"accepted: p50 {p50:.2f} s, p99 {p99:.2f} s, most {late.max():.2f} s")
    span = f"between {min(settled):.0f} and {max(settled):.0f}"
    print(f"memory MB: {settled[0]:.0f} after a tenth, {settled[-1]:.0f} at the end, {span}")
    print(f"afterwards one request: {after[0]}")
    if wrong or statuses["no answer"] or after[0] != 200 or (len(late) and late.max() > DEADLINE + 1):
        raise UserError("soak: expected no wrong answer, no request without one, and none accepted past the deadline")


def same(a, b):
    return all(abs(a["scores"][label] - b["scores"][label]) < 1e-3 for label in a["scores"])


async def overload(server, asked, rate, seconds):
    """([(number of the row, status, seconds, answer)], memory in MB every second); "left" for those who left."""
    results, memory, running = [], [], set()
    http = psutil.Process(server.process.pid)
    processes = [http, *http.children()]  # the other one owns the models
    started = time.monotonic()
    bar = tqdm(total=int(seconds), desc="overload", unit="s", file=sys.stderr)
    for k in range(int(rate * seconds)):
        await asyncio.sleep(max(0, started + k / rate - time.monotonic()))
        task = asyncio.create_task(ask(server, k % len(asked), *asked[k % len(asked)], leave=k % 10 == 9))
        running.add(task)
        task.add_done_callback(lambda t: (running.discard(t), results.append(t.result())))
        while len(memory) <= time.monotonic() - started:
            memory.append(sum(p.memory_info().rss for p in processes) / 2**20)
            bar.update()
    while running:
        await asyncio.wait(running)
    bar.close()
    return results, memory


async def ask(server, i, model, text, leave):
    body = json.dumps({"features": text}).encode()
    head = f"POST /infer/{model} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    started = time.monotonic()
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if not leave:
                reply = await reader.read()
            writer.close()
        if leave:
            return i, "left", 0.0, None
        top, content = reply.split(b"\r\n\r\n", 1)
        status = int(top.split()[1])
        return i, status, time.monotonic() - started, json.loads(content) if status == 200 else None
    except (OSError, TimeoutError, ValueError, IndexError):
        return i, "no answer", time.monotonic() - started, None


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default=EMBEDDED, help="base model (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=10, help="length of the overload (default: 10)")
    p.add_argument("--factor", type=float, default=4, help="arrivals as a multiple of capacity (default: 4)")
    cli(main, p)
