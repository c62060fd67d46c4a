"""Serve a label task over HTTP: base, SFT, KD and DPO on one base model in memory, batched, with a web page.

    python serve_creditmix.py                            Qwen2.5-3B with runs/creditmix_{sft,kd,dpo}, 127.0.0.1:8000
    BASE_MODEL=smollm2-135m python serve_creditmix.py    CPU: the embedded student with runs/smollm2_{sft,kd,dpo}
    uvicorn serve_creditmix:app                          the same app under any ASGI server (one base model per worker)
    python serve_creditmix.py --replicas 2               Ray Serve (requirements-ray.txt), one base model per replica

    curl -X POST localhost:8000/infer/sft -H 'Content-Type: application/json' -d '{"features": "Age: 23.0, ..."}'

Environment: BASE_MODEL; SFT_DIR, KD_DIR, DPO_DIR; TASK (data/creditmix_task.json); HOST, PORT; API_KEY (/infer, /v1 and
/admin then require the header X-API-Key or Authorization: Bearer); DEADLINE (30 seconds per request); MAX_QUEUE (512
rows); MAX_ROW_TOKENS (of a row with its prompt: four times the 99th percentile of the training rows, or 1024 if that is
unknown; of a text with other questions: 2048); MAX_VRAM_GB (the GPU's, less 0.8 under WSL2); PRECISION (auto, nf4,
bf16, fp32); OFFLOAD_FOLDER (for layers that fit neither on the GPU, in 4 bits, nor in RAM); CLASS_PRIOR (the class mix
that probabilities are for: natural, balanced, a JSON object of shares or a file; default: that of training).

/v1/systemone and /v1/decisions answer typed questions about a text (distill/serve/decisions.py). This process speaks
HTTP and bounds the queue. A second process owns the models and scores rows of all four in one forward pass
(distill/serve/engine.py). Nothing is kept on disk.
"""

import argparse
import asyncio
import contextlib
import os
import sys
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from distill.files import ROOT, UserError, cli
from distill.serve.client import EngineClient
from distill.serve.decisions import router as decisions_router
from distill.serve.description import example, fields, openapi, title
from distill.serve.errors import Problem, failed, http_error, malformed
from distill.serve.keys import check_key, check_operator
from distill.serve.limits import (
    CLASSES,
    MARGIN,
    MAX_FEATURES,
    MAX_LIST,
    REJECTIONS,
    RequestLimits,
    log,
    open_log,
    warn_if_exposed,
)
from distill.serve.settings import MODELS, PRECISIONS, Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# ---------------------------------------------------------------------------------------------------------------------
# The app


@contextlib.asynccontextmanager
async def lifespan(app):
    open_log()
    engine = app.state.engine = EngineClient(
        Settings.from_environment(), getattr(app.state, "on_failure", lambda: None)
    )
    await engine.start()
    running = asyncio.create_task(engine.run())
    on_ray = getattr(app.state, "on_ray", False)
    while on_ray and engine.state == "loading":  # Ray sends requests as soon as a replica has started
        await asyncio.sleep(0.1)
    warning = asyncio.create_task(warn_if_exposed()) if not (engine.settings.api_key or on_ray) else None
    yield  # returns once every accepted request is answered
    if warning:
        warning.cancel()
    await engine.stop()
    await running


app = FastAPI(
    description="Label models with calibrated scores. Probabilities mean something only for a fitted model (/readyz).",
    lifespan=lifespan,
    docs_url=None,  # FastAPI's own pages load scripts from elsewhere; ours is below
    redoc_url=None,
)
app.add_middleware(RequestLimits)
app.openapi = lambda: openapi(app)


app.include_router(decisions_router)
app.add_exception_handler(RequestValidationError, malformed)
for kind in (HTTPException, 400, 404, 405):  # those that the framework raises itself are of another class
    app.add_exception_handler(kind, http_error)
app.add_exception_handler(Exception, failed)

Features = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_FEATURES)]
Scores = dict[str, float]


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    features: Features


class Questions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    features: list[Features] = Field(min_length=1, max_length=MAX_LIST)


class Adapter(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: Literal[MODELS[1:]] = Field(examples=["sft"])


class Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    model_name: str = Field(examples=["sft"])
    prediction: str
    scores: Scores = Field(description="calibrated")
    raw_scores: Scores = Field(description="length-normalised log-likelihoods")
    prior: Scores = Field(description="the model's mean raw scores of content-free inputs")
    probabilities: Scores = Field(description="softmax of the calibrated scores")
    top2_margin: float = Field(description="best calibrated score less the next", examples=[1.5])


PROBLEMS = {code: {"model": Problem, "description": reason} for code, reason in REJECTIONS.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Answers


async def classify(request: Request, model: str, texts: list[str]) -> list[dict]:
    """The answers to one request's rows, in order."""
    engine = request.app.state.engine
    engine.check(model)
    found = await engine.answers(request, model, engine.prompts(texts))
    for answer in found:
        CLASSES.labels(model, answer["prediction"]).inc()
        MARGIN.labels(model).observe(answer["top2_margin"])
    return found


@app.post("/infer/{model}", dependencies=[Depends(check_key)], responses=PROBLEMS)
async def infer(model: Literal[MODELS], question: Question, request: Request) -> Answer:
    """Classify one row."""
    return (await classify(request, model, [question.features]))[0]


@app.post("/infer/{model}/batch", dependencies=[Depends(check_key)], responses=PROBLEMS)
async def infer_list(model: Literal[MODELS], questions: Questions, request: Request) -> list[Answer]:
    """Classify a list of rows; answers come in the same order."""
    return await classify(request, model, questions.features)


@app.post(
    "/admin/reload", dependencies=[Depends(check_operator)], responses=PROBLEMS | {403: {}, 409: {"model": Problem}}
)
async def reload(adapter: Adapter, request: Request) -> dict[str, str]:
    """Reload a retrained adapter from its folder. If that fails, 409 says why and the previous adapter stays in use."""
    engine = request.app.state.engine
    engine.check("base")
    if why := await engine.reload(adapter.model):
        log("reload refused", model=adapter.model, detail=why)
        raise HTTPException(409, why)
    log("reloaded", model=adapter.model)
    return {"reloaded": adapter.model}


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive; /readyz says whether the models can answer."""
    return {"status": "alive"}


@app.get("/readyz", responses={503: {"description": "loading, stopped, or the base model did not load"}})
async def readyz(request: Request):
    """The state of the base and of each model; 200 once the base can answer with calibrated scores."""
    engine = request.app.state.engine
    task = engine.settings.task
    report = {"status": engine.state, "detail": engine.failure, "base_model": engine.settings.base}
    report |= {"labels": task.labels, "fields": fields(task), "models": engine.models}
    report |= {"task": task.name, "title": title(task), "instruction": task.template, "example": example(task)}
    report |= {"max_row_tokens": engine.max_row_tokens}
    return JSONResponse(report, 200 if engine.state == "ready" else 503)


@app.get("/metrics", response_class=Response)
async def metrics():
    """Metrics for Prometheus; they hold no text of any request."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.get("/", response_class=HTMLResponse)
async def page():
    """The models side by side."""
    return html("serve_page.html")


@app.get("/docs", response_class=HTMLResponse)
async def docs():
    """This interface, made from /openapi.json."""
    return html("serve_docs.html")


def html(name: str) -> HTMLResponse:
    """A self-contained page; its policy forbids loading anything from elsewhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    text = (ROOT / "data" / name).read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


# ---------------------------------------------------------------------------------------------------------------------
# Starting


def app_of_replica():
    """The app, imported in each Ray replica: it cannot be pickled, since its metrics hold locks."""
    from serve_creditmix import app

    app.state.on_ray = True
    return app


def serve_on_ray(host: str, port: int, replicas: int, gpus: float):
    """Serve `replicas` copies of this app at one address, each with its own base model and queue."""
    import ray
    from ray import serve

    # on the cluster at RAY_ADDRESS if set, else on this machine
    ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    serve.start(http_options={"host": host, "port": port})

    @serve.deployment(
        num_replicas=replicas, max_ongoing_requests=128, ray_actor_options={"num_cpus": 1, "num_gpus": gpus}
    )
    @serve.ingress(app_of_replica)
    class LabelServer:
        pass

    serve.run(LabelServer.bind(), blocking=True)


def main(args):
    if args.precision:
        os.environ["PRECISION"] = args.precision
    settings = Settings.from_environment()  # reports errors before anything starts
    if args.replicas:
        if args.host not in LOOPBACK and not settings.api_key:
            print(f"warning: listening on {args.host} without API_KEY: anyone who reaches it may ask", file=sys.stderr)
        return serve_on_ray(args.host, args.port, args.replicas, args.gpus)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, args.host, args.port, access_log=False, limit_concurrency=4096))
    app.state.on_failure = lambda: setattr(server, "should_exit", True)
    server.run()
    if app.state.engine.failure:
        raise UserError(app.state.engine.failure)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--host", default=os.environ.get("HOST", "127.0.0.1"), help="address (default: HOST or 127.0.0.1)")
    p.add_argument("--port", type=int, default=os.environ.get("PORT", "8000"), help="port (default: PORT or 8000)")
    p.add_argument("--precision", choices=PRECISIONS, help="of the base model (default: PRECISION or auto)")
    p.add_argument("--replicas", type=int, help="replicas under Ray Serve (requirements-ray.txt); default: no Ray")
    p.add_argument(
        "--gpus", type=float, default=0, help="a replica's share of GPUs under Ray, such as 0.5 (default: 0)"
    )
    cli(main, p)
