"""The decision protocol: a text and typed questions about it in, probabilities out.

    POST /v1/systemone        as vLLM, llama.cpp and TypeSafe serve it (distill/serve/systemone.py)
    POST /v1/decisions        the same in OpenAI's shape (distill/serve/openai_decisions.py)
    GET /v1/models            base, sft, kd, dpo: those that can answer now

`model` answers all questions of a request. A choice between exactly the labels of the server's task is that task: the
model's own prompt and calibration, as POST /infer/{model}; its instructions and descriptions are not read. Every other
question goes through the prompt of distill/serve/decision_prompt.py with the null calibration. x_calibration says
which: fitted or null.
"""

import asyncio
import contextlib
import functools
import json
import time
from datetime import UTC, datetime
from typing import Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from common import label_trie, prompt_ids
from distill.files import UserError
from distill.model.label_forward import shared_prefix
from distill.serve.client import EngineClient, Prompt
from distill.serve.decision_prompt import content_text, decision_prompt, question_text
from distill.serve.errors import OpenAIProblem, SystemOneProblem, invalid_field
from distill.serve.keys import check_key
from distill.serve.limits import CLASSES, MARGIN, QUESTIONS, REJECTIONS
from distill.serve.openai_decisions import DecisionsRequest, DecisionsResponse, OpenAIUsage, input_text
from distill.serve.question_scorer import Branch, width
from distill.serve.settings import MODELS
from distill.serve.systemone import SystemOneRequest, SystemOneResponse, Usage

PASS_TOKENS = 2048  # of a text with its questions in one forward pass; more questions get further passes
STARTED = time.time()
Place = tuple[str | int, ...]
router = APIRouter(dependencies=[Depends(check_key)])


async def ask(request: Request, model: str, state: str, questions: dict[Place, BaseModel]) -> tuple[list, int]:
    """The answer to each question about `state`, in order, and the tokens that were read.

    questions: place in the request -> question of one of the protocols. Errors: HTTPException 404, 413, 499, 503, 504;
    RequestValidationError for an option that cannot be an answer.
    """
    engine = request.app.state.engine
    request.state.model = model
    engine.check(model)
    labels = set(engine.settings.task.labels)
    own = {place for place, one in questions.items() if one.type == "choice" and set(shown(one)) == labels}
    typed = {place: question for place, question in questions.items() if place not in own}
    rows = await asyncio.to_thread(question_prompts, engine, state, typed) if typed else []
    prompts = [*(task_prompts(engine, state) if own else []), *(prompt for prompt, _ in rows)]
    answers = await engine.answers(request, model, prompts)
    found = {}
    if own:
        label, *answers = answers
        CLASSES.labels(model, label["prediction"]).inc()
        MARGIN.labels(model).observe(label["top2_margin"])
        found = dict.fromkeys(own, label["probabilities"])
    for (_, places), of_row in zip(rows, answers, strict=True):
        for place, probabilities in zip(places, of_row, strict=True):
            found[place] = dict(zip(shown(typed[place]), probabilities, strict=True))
    filled = []
    for place, question in questions.items():
        fit = engine.models[model]["calibration"] if place in own else "null"
        QUESTIONS.labels(model, question.type, fit).inc()
        filled.append(question.answer([found[place][name] for name, _ in question.options()], fit))
    return filled, sum(len(one.ids) + sum(len(branch.ids) for branch in one.questions) for one in prompts)


def shown(question: BaseModel) -> list[str]:
    """The options in the order in which the prompt shows them."""
    return sorted(name for name, _ in question.options())


def task_prompts(engine: EngineClient, state: str) -> list[Prompt]:
    """The prompt of the server's own task about `state`. Error: HTTPException 413."""
    ids = prompt_ids(engine.tokenizer, [engine.settings.task.prompt(state)])
    check_state(len(ids[0]), engine.max_row_tokens)
    return [Prompt(ids[0], max(1, len(ids[0]) - engine.prefix))]


def question_prompts(
    engine: EngineClient, state: str, questions: dict[Place, BaseModel]
) -> list[tuple[Prompt, list[Place]]]:
    """The questions as branches after `state`, in rows of at most PASS_TOKENS or one question -> (row, its questions).

    Errors: HTTPException 413 for a state or question that is too long; RequestValidationError for an option that cannot
    be an answer, such as one that ends the assistant's turn.
    """
    tokenizer = engine.tokenizer
    check_state(len(prompt_ids(tokenizer, [state])[0]), engine.max_state_tokens)
    texts = [question_text(question.text(), sorted(question.options())) for question in questions.values()]
    ids = prompt_ids(tokenizer, [decision_prompt(state, text) for text in texts])
    prefix = shared_prefix(ids)
    rows = []
    for (place, question), text, own in zip(questions.items(), texts, ids, strict=True):
        try:
            branch = Branch(text, own[len(prefix) :], option_ids(tokenizer, tuple(shown(question))))
        except UserError as e:
            raise invalid_field(place, str(e)) from None
        if (tokens := len(prefix) + width(branch)) > engine.context:
            too_long = f"{tokens} tokens with the state and the options; expected at most {engine.context}"
            raise HTTPException(413, f"{'.'.join(map(str, place))}: {too_long}")
        if not rows or rows[-1][0].tokens + width(branch) > PASS_TOKENS:
            rows.append((Prompt(prefix, len(prefix)), []))
        row, places = rows[-1]
        row.questions.append(branch)
        row.tokens += width(branch)
        places.append(place)
    return rows


@functools.lru_cache(256)
def option_ids(tokenizer: PreTrainedTokenizerBase, options: tuple[str, ...]) -> list[list[int]]:
    """Token ids of each option as the assistant's turn, none a prefix of another. Error: UserError as label_trie."""
    trie = label_trie(tokenizer, options)
    return [ids[used > 0].tolist() for ids, used in zip(trie.token, trie.weight, strict=True)]


def check_state(tokens: int, most: int) -> None:
    """HTTPException 413 for a state of more than `most` tokens."""
    if tokens > most:
        raise HTTPException(413, f"the state has {tokens} tokens with the prompt; expected at most {most}")


# ---------------------------------------------------------------------------------------------------------------------
# Endpoints


async def unique_keys(request: Request) -> None:
    """RequestValidationError for a JSON object that names a key twice: a parser would keep one option of two."""

    def pairs(found: list[tuple[str, object]]) -> dict:
        kept = dict(found)
        if len(kept) < len(found):
            raise invalid_field((), "expected JSON whose objects have different keys")
        return kept

    with contextlib.suppress(ValueError):  # broken JSON has an error of its own
        json.loads(await request.body(), object_pairs_hook=pairs)


def responses(model: type[BaseModel], malformed: int) -> dict:
    """What the schema says of errors. malformed: the protocol's status for a malformed request, 422 or 400."""
    known = {code: reason for code, reason in REJECTIONS.items() if code != 422} | {malformed: "invalid"}
    # "4XX" keeps FastAPI from adding a 422 of its own
    return {code: {"model": model, "description": reason} for code, reason in known.items()} | {"4XX": {"model": model}}


@router.post("/v1/systemone", dependencies=[Depends(unique_keys)], responses=responses(SystemOneProblem, 422))
async def systemone(body: SystemOneRequest, request: Request) -> SystemOneResponse:
    """Answer typed questions about a text or JSON with probabilities."""
    questions = {("questions", name): question for name, question in body.questions.items()}
    answers, tokens = await ask(request, body.model, content_text(body.state), questions)
    named = dict(zip(body.questions, answers, strict=True))
    return SystemOneResponse(model=body.model, answers=named, usage=Usage(input_tokens=tokens))


@router.post("/v1/decisions", dependencies=[Depends(unique_keys)], responses=responses(OpenAIProblem, 400))
async def decisions(body: DecisionsRequest, request: Request) -> DecisionsResponse:
    """The same in the shape of OpenAI's Decisions API."""
    questions = {("questions", i): question for i, question in enumerate(body.questions)}
    answers, tokens = await ask(request, body.model, input_text(body.input), questions)
    usage = OpenAIUsage(input_tokens=tokens, total_tokens=tokens)
    return DecisionsResponse(model=body.model, answers=answers, usage=usage)


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when this server started")
    owned_by: str = "distill-slm"


class ModelSummary(BaseModel):
    name: str
    description: str
    release_date: str = Field(description="the day on which this server started")


class ModelList(BaseModel):
    """OpenAI's list and TypeSafe's in one."""

    object: Literal["list"] = "list"
    data: list[Model]
    models: list[ModelSummary]


@router.get("/v1/models", responses=responses(OpenAIProblem, 400))
async def models(request: Request) -> ModelList:
    """The models that can answer now."""
    engine = request.app.state.engine
    engine.check("base")
    ready = {name: state["calibration"] for name, state in engine.models.items() if state["state"] == "ready"}
    day, task = datetime.fromtimestamp(STARTED, UTC).date().isoformat(), engine.settings.task.name
    about = {name: f"{name} on {engine.settings.base}: {fit} calibration for {task}" for name, fit in ready.items()}
    summaries = [ModelSummary(name=name, description=text, release_date=day) for name, text in about.items()]
    return ModelList(data=[Model(id=name, created=int(STARTED)) for name in ready], models=summaries)


@router.get("/v1/models/{name}", responses=responses(OpenAIProblem, 400))
async def model(name: str, request: Request) -> Model:
    """One of the models."""
    for one in (await models(request)).data:
        if one.id == name:
            return one
    raise HTTPException(404, f"no such model; expected one of {', '.join(MODELS)}")
