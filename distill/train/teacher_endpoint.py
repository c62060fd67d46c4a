"""An endpoint as a teacher: requests through the openai client, eight at a time, within a limit of cost.

The client retries 408, 409, 429, 5xx and broken connections with growing pauses and honours Retry-After. `openai` is
imported only when an endpoint is asked.
"""

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from pydantic import AnyHttpUrl, TypeAdapter, ValidationError

from common import Task
from distill.files import UserError, one_line
from distill.train.teacher_apis import APIS, Answer, Chat, SystemOne

CONCURRENT_REQUESTS = 8
ATTEMPTS = 6  # per request


@dataclass(frozen=True)
class Endpoint:
    """Address (ending in /v1), model name, seconds that it may stay silent, protocol (APIS), and prices.

    price_in, price_out: of a million tokens of prompts and of answers. max_cost: in the same currency, for all answers
    of a file, earlier runs included.
    """

    url: str
    model: str | None
    timeout: float = 120.0
    api: str = "chat"
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None

    def check(self, task: Task | None) -> None:
        """Raise UserError for an endpoint that cannot be asked. Nothing is sent."""
        try:
            url = TypeAdapter(AnyHttpUrl).validate_python(self.url)
        except ValidationError as e:
            raise UserError(f"--teacher: {e.errors()[0]['msg']}; expected http://host:port/v1 or https") from None
        if url.username or url.password:
            raise UserError("--teacher: expected http://host:port/v1 or https; a key goes into OPENAI_API_KEY")
        if not self.model:
            raise UserError(f"--teacher {self.url}: expected --teacher_model, the model's name there")
        if self.api != "chat" and task is None:
            raise UserError(f"--teacher_api {self.api}: it gives label probabilities; expected a label task (--task)")
        if self.max_cost is not None and None in (self.price_in, self.price_out):
            raise UserError("--max_cost: expected --price_in and --price_out too")

    def protocol(self, task: Task | None, max_tokens: int) -> Chat | SystemOne:
        """max_tokens: the most that a free text may have."""
        return APIS[self.api](self.model, task, max_tokens)

    def after(self, cost: float | None) -> "Endpoint":
        """The same endpoint with what is left of max_cost."""
        return self if self.max_cost is None else replace(self, max_cost=max(0.0, self.max_cost - (cost or 0.0)))

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """None where a price is unknown."""
        if None in (self.price_in, self.price_out):
            return None
        return (input_tokens * self.price_in + output_tokens * self.price_out) / 1e6


def announce_cost(endpoint: Endpoint, prompt_tokens: dict[str, int], max_tokens: int, spent: float = 0.0) -> None:
    """Print how much will be sent and what it costs.

    prompt_tokens: {prompt: its tokens}. max_tokens: the most that an answer may have. spent: what earlier runs cost.

    Raises UserError when max_cost does not even cover the prompts.
    """
    count, sent, received = len(prompt_tokens), sum(prompt_tokens.values()), len(prompt_tokens) * max_tokens
    line = f"{count} requests: about {sent} tokens in, by the student's tokenizer, and at most {received} out"
    prompts, answers = endpoint.cost(sent, 0), endpoint.cost(0, received)
    if prompts is not None:
        line += f"; they cost about {prompts:.4g} and at most {answers:.4g}"
        line += f", after {spent:.4g} for the answers that are there" if spent else ""
        if endpoint.max_cost is not None and spent + prompts > endpoint.max_cost:
            raise UserError(f"--max_cost {endpoint.max_cost:g}: expected more, or fewer rows: {line}")
    print(line)


def usage_of(answers: dict[str, Answer], prompt_tokens: dict[str, int], max_tokens: int) -> tuple[int, int]:
    """(input tokens, output tokens) of the answers to the prompts, as the endpoint reported them.

    Where it reported none, the prompt counts as in prompt_tokens and the answer with max_tokens.
    """
    used = [(answers[prompt], n) for prompt, n in prompt_tokens.items() if prompt in answers]
    sent = sum(n if answer.input_tokens is None else answer.input_tokens for answer, n in used)
    received = sum(max_tokens if answer.output_tokens is None else answer.output_tokens for answer, _ in used)
    return sent, received


def ask_endpoint(
    endpoint: Endpoint,
    protocol: Chat | SystemOne,
    prompt_tokens: dict[str, int],
    keep: Callable[[str, Answer], None],
    spent: float = 0.0,
) -> None:
    """Ask for an answer to each prompt; call keep(prompt, answer) as answers arrive.

    prompt_tokens: {prompt: its tokens}, for the cost. spent: what counts against max_cost already.

    Raises UserError naming address and status when a request fails for good, and when max_cost is reached. What was
    kept stays.
    """
    from tqdm import tqdm

    bar = tqdm(total=len(prompt_tokens), desc="teacher", unit="answer", file=sys.stderr)

    def received(prompt, answer):
        keep(prompt, answer)
        bar.update()

    try:
        asyncio.run(ask_all(endpoint, protocol, prompt_tokens, received, spent))
    except UserError as e:
        raise UserError(f"{e}; {bar.n} of {len(prompt_tokens)} answers are kept, the same command continues") from None
    finally:
        bar.close()


async def ask_all(
    endpoint: Endpoint,
    protocol: Chat | SystemOne,
    prompt_tokens: dict[str, int],
    received: Callable[[str, Answer], None],
    spent: float,
) -> None:
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip()  # a key read from a file may end in a line break
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: expected printable ASCII characters")
    client = openai.AsyncOpenAI(
        base_url=endpoint.url,
        api_key=key or "none",  # a server without keys ignores it
        timeout=endpoint.timeout,
        max_retries=ATTEMPTS - 1,
        http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),  # prompts go where --teacher says
    )
    waiting, limit, reserved = deque(prompt_tokens.items()), endpoint.max_cost, 0.0

    async def worker():
        nonlocal spent, reserved
        while waiting:
            # a request under way counts as if its answer had every token it may have, so the limit is not exceeded
            most = endpoint.cost(waiting[0][1], protocol.max_tokens)
            if limit is not None and spent + reserved + most > limit:
                return  # requests under way are paid for: they may end
            prompt, tokens = waiting.popleft()
            reserved += most or 0
            answer = await ask_one(client, endpoint, protocol, prompt)
            reserved -= most or 0
            spent += endpoint.cost(*usage_of({prompt: answer}, {prompt: tokens}, protocol.max_tokens)) or 0
            received(prompt, answer)

    async with client:
        await asyncio.gather(*(worker() for _ in range(min(CONCURRENT_REQUESTS, len(prompt_tokens)))))
    if waiting:
        raise UserError(f"--max_cost {limit:g}: {spent:.4g} spent, another request may exceed it; expected more")


async def ask_one(client, endpoint: Endpoint, protocol: Chat | SystemOne, prompt: str) -> Answer:
    """Raises UserError when the request fails for good."""
    import openai

    try:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.25 * 2**attempt)
            reply = await client.post(protocol.path, body=protocol.body(prompt), cast_to=bytes)
            try:
                return protocol.read(json.loads(reply))
            except (ValueError, RecursionError):  # for example the HTML page of a proxy: asked again
                pass
        shown, attempts = reply[:80].decode("utf-8", "replace"), ATTEMPTS
        problem = f"status 200, but no {protocol.expected} in {shown!r}"
    except openai.APIError as e:
        attempts = 1 + int(e.request.headers.get("x-stainless-retry-count", 0))
        if isinstance(e, openai.APITimeoutError):
            problem = f"no answer in {endpoint.timeout:g} s (--teacher_timeout)"
        elif isinstance(e, openai.APIStatusError):
            problem = f"status {e.status_code}: {e.response.text[:200].strip()!r}"
        else:  # no connection, or it broke
            problem = f"{type(e.__cause__).__name__}: {one_line(e.__cause__)}"
    times = f"{attempts} attempts" if attempts > 1 else "1 attempt"
    url = f"{endpoint.url.rstrip('/')}{protocol.path}"
    raise UserError(f"{url}: {problem}, {times} for the prompt {prompt[:40]!r}")
