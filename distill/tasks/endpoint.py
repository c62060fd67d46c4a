"""Answers from an OpenAI-compatible server (llama.cpp, Ollama, vLLM) in place of a model in this process.

`openai` is imported only when an endpoint is opened. Its client retries broken connections, 429 and 5xx by itself.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distill.files import UserError, one_line
from distill.model.generate import Reply

TIMEOUT_S = 600  # of one answer: a server on a CPU reads a long prompt for minutes
TURN_MARKER = re.compile(r"<\|\w+\|>")


class Endpoint:
    """A server that speaks OpenAI's chat completions, and the model to ask there."""

    def __init__(self, url: str, model: str | None = None):
        """url: ends in /v1. model: its name there (default: the first that the server lists).

        The key, where the server wants one, is read from OPENAI_API_KEY.
        Error: UserError, one line, where nobody answers at the address.
        """
        import openai

        if not re.match(r"https?://[^/@\s]+(/|$)", url):
            raise UserError(f"--endpoint {url}: expected http://host:port/v1 or https; a key goes into OPENAI_API_KEY")
        self.url = url
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "none",  # a server without keys ignores it
            timeout=TIMEOUT_S,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),  # documents go where --endpoint says
        )
        names = [m.id for m in self.call(self.client.models.list).data]
        if not (model or names):
            raise UserError(f"--endpoint {url}: it lists no model; expected --endpoint_model NAME")
        self.model = model or names[0]

    def call(self, method: Callable, **fields) -> Any:
        """The parsed answer to one request. Error: UserError with address and reason."""
        import openai

        try:
            return method(**fields)
        except openai.APITimeoutError:
            raise UserError(f"--endpoint {self.url}: no answer in {TIMEOUT_S} s") from None
        except openai.APIStatusError as e:
            text = " ".join(e.response.text.split())[:200]
            raise UserError(f"--endpoint {self.url}: status {e.status_code}: {text}") from None
        except openai.APIConnectionError as e:
            raise UserError(f"--endpoint {self.url}: nobody answers: {one_line(e.__cause__ or e)}") from None
        except (openai.APIError, ValueError) as e:
            raise UserError(f"--endpoint {self.url}: no chat completion: {one_line(e)}") from None

    def ask(self, prompt: str, max_new_tokens: int, temperature: float, seed: int, schema=None) -> Reply:
        """One reply. schema: a JSON Schema that the server is asked to hold the reply to; it may not, so validate."""
        extra = {}
        if schema is not None:
            form = {"name": "result", "strict": True, "schema": schema}
            extra["response_format"] = {"type": "json_schema", "json_schema": form}
        answer = self.call(
            self.client.chat.completions.create,
            model=self.model,
            # text from outside must not open or close a turn, and most servers read these markers as such
            messages=[{"role": "user", "content": TURN_MARKER.sub(lambda m: f"< {m[0][1:]}", prompt)}],
            max_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed % 2**31,
            **extra,
        )
        choice = answer.choices[0] if answer.choices else None
        if choice is None or choice.message is None:
            raise UserError(f"--endpoint {self.url}: an answer without choices[0].message")
        count = answer.usage.completion_tokens if answer.usage else 0
        return Reply(choice.message.content or "", [-1] * count, choice.finish_reason == "stop")  # no ids, their number

    def replies(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        batch_size: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        schema=None,
        on_reply: Callable[[int, int, Reply], None] | None = None,
    ) -> list[list[Reply]]:
        """One reply per prompt, batch_size requests at once; shape and on_reply as those of model.generate."""
        seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
        found = []
        with ThreadPoolExecutor(batch_size) as pool:
            jobs = [
                pool.submit(self.ask, p, max_new_tokens, temperature, s, schema)
                for p, s in zip(prompts, seeds, strict=True)
            ]
            try:
                for i, job in enumerate(jobs):
                    found.append([job.result()])
                    if on_reply:
                        on_reply(i, 0, found[-1][0])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found
