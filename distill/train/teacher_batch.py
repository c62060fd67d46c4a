"""Requests to a teacher as files for the OpenAI Batch API, which answers within a day at half the price.

The file of requests is uploaded and the results are downloaded with OpenAI's own tools; nothing is sent from here. A
request's custom_id is the hash of its prompt, so results find their rows in whatever order and file they come.
"""

import json
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from common import row_hash
from distill.files import FilledText, StrictModel, UserError, read_rows, write_jsonl
from distill.train.teacher_apis import Answer, Chat, SystemOne
from distill.train.teacher_endpoint import Endpoint

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # of one file (OpenAI's limits)


def write_batch(path: Path, endpoint: Endpoint, protocol: Chat | SystemOne, prompts: list[str]) -> list[Path]:
    """Write one request per prompt to `path`, and to path-2, path-3 ... what is over the limits of one file."""
    url = urlsplit(endpoint.url).path.rstrip("/") + protocol.path
    parts, size = [[]], 0
    for prompt in prompts:
        request = {"custom_id": row_hash(prompt), "method": "POST", "url": url, "body": protocol.body(prompt)}
        length = len(json.dumps(request, ensure_ascii=False).encode()) + 1
        if len(parts[-1]) == MAX_REQUESTS or size + length > MAX_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(request)
        size += length
    paths = [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(2, len(parts) + 1))]
    for name, requests in zip(paths, parts, strict=True):
        write_jsonl(name, requests)
    return paths


class BatchResult(StrictModel):
    custom_id: FilledText
    response: dict | None = None
    error: dict | None = None


def read_batch(
    paths: list[str | Path], protocol: Chat | SystemOne, prompts: list[str]
) -> tuple[dict[str, Answer], dict[str, int]]:
    """Read files of results: ({prompt: answer}, {why there is none: results}).

    Raises UserError naming file and line of what is no result of a batch.
    """
    by_hash = {row_hash(prompt): prompt for prompt in prompts}
    answers, failed = {}, Counter()
    for path in paths:
        for i, row in enumerate(read_rows(path, BatchResult), 1):
            if "response" not in row and "error" not in row:
                raise UserError(f"{path}: result {i}: field 'response' is missing; expected a result, not a request")
            response = row.get("response") or {}
            prompt = by_hash.get(row["custom_id"])
            if prompt is None:
                failed["are already stored or of other data"] += 1
            elif row.get("error") or response.get("status_code") != 200:
                body = response.get("body")
                error = row.get("error") or (body.get("error") if isinstance(body, dict) else None) or {}
                message = error.get("message") if isinstance(error, dict) else error
                failed[f"failed: status {response.get('status_code')}: {str(message)[:80]!r}"] += 1
            else:
                try:
                    answers[prompt] = protocol.read(response.get("body"))
                except ValueError:
                    failed[f"have no {protocol.expected}"] += 1
    return answers, dict(failed)
