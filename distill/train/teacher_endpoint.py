"""An OpenAI-compatible endpoint as a teacher: chat completions through the openai client, eight at a time.

The client retries 408, 409, 429, 5xx and broken connections with growing pauses and honours Retry-After. `openai` is
imported only when an endpoint is asked.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import AnyHttpUrl, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from distill.files import UserError, one_line

CONCURRENT_REQUESTS = 8
ATTEMPTS = 6  # per request


@dataclass(frozen=True)
class Endpoint:
    """Address, ending in /v1, and model name; timeout in seconds: how long an endpoint may stay silent."""

    url: str
    model: str | None
    timeout: float = 120.0

    def check(self) -> None:
        """Raise UserError for an address that cannot be asked. Nothing is sent."""
        try:
            url = TypeAdapter(AnyHttpUrl).validate_python(self.url)
        except ValidationError as e:
            raise UserError(f"--teacher: {e.errors()[0]['msg']}; expected http://host:port/v1 or https") from None
        if url.username or url.password:
            raise UserError("--teacher: expected http://host:port/v1 or https; a key goes into OPENAI_API_KEY")
        if not self.model:
            raise UserError(f"--teacher {self.url}: expected --teacher_model, the model's name there")


def well_formed(text):
    """Text with half a character (a lone surrogate, which JSON can carry and UTF-8 cannot) replaced by "?"."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


class Message(BaseModel, strict=True):
    content: Annotated[str | None, BeforeValidator(well_formed)]


class Choice(BaseModel, strict=True):
    message: Message
    finish_reason: str | None = None


class ChatCompletion(BaseModel, strict=True):
    """The fields that are read of a chat completion."""

    choices: list[Choice] = Field(min_length=1)


def ask_endpoint(endpoint: Endpoint, prompts: list[str], max_tokens: int, keep: Callable[[str, str, bool], None]):
    """Ask for an answer to each prompt; call keep(prompt, text, whole) as answers arrive.

    whole is False for a text that was cut at max_tokens.

    Raises UserError naming address and status when a request fails for good. What was kept stays.
    """
    from tqdm import tqdm

    bar = tqdm(total=len(prompts), desc="teacher", unit="answer", file=sys.stderr)

    def received(prompt, text, whole):
        keep(prompt, text, whole)
        bar.update()

    try:
        asyncio.run(ask_all(endpoint, prompts, max_tokens, received))
    except UserError as e:
        raise UserError(f"{e}; {bar.n} of {len(prompts)} answers are kept, the same command continues") from None
    finally:
        bar.close()


async def ask_all(endpoint: Endpoint, prompts: list[str], max_tokens: int, received: Callable[[str, str, bool], None]):
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
    waiting = iter(prompts)

    async def worker():
        for prompt in waiting:
            text, whole = await ask_one(client, endpoint, prompt, max_tokens)
            received(prompt, text, whole)

    async with client:
        await asyncio.gather(*(worker() for _ in range(min(CONCURRENT_REQUESTS, len(prompts)))))


async def ask_one(client, endpoint: Endpoint, prompt: str, max_tokens: int) -> tuple[str, bool]:
    """(text, whole) of one prompt. Raises UserError when the request fails for good."""
    import openai

    messages = [{"role": "user", "content": prompt}]
    body = {"model": endpoint.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    try:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.25 * 2**attempt)
            answer = await client.post("/chat/completions", body=body, cast_to=bytes)
            try:
                choice = ChatCompletion.model_validate(json.loads(answer)).choices[0]
                return choice.message.content or "", choice.finish_reason != "length"
            except (ValueError, RecursionError):  # for example the HTML page of a proxy: asked again
                pass
        shown, attempts = answer[:80].decode("utf-8", "replace"), ATTEMPTS
        problem = f"status 200, but no choices[0].message.content in {shown!r}"
    except openai.APIError as e:
        attempts = 1 + int(e.request.headers.get("x-stainless-retry-count", 0))
        if isinstance(e, openai.APITimeoutError):
            problem = f"no answer in {endpoint.timeout:g} s (--teacher_timeout)"
        elif isinstance(e, openai.APIStatusError):
            problem = f"status {e.status_code}: {e.response.text[:200].strip()!r}"
        else:  # no connection, or it broke
            problem = f"{type(e.__cause__).__name__}: {one_line(e.__cause__)}"
    times = f"{attempts} attempts" if attempts > 1 else "1 attempt"
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    raise UserError(f"{url}: {problem}, {times} for the prompt {prompt[:40]!r}")
