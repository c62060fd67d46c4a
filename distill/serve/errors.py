"""Errors in the shape of the protocol that was asked.

/v1/decisions, /v1/models   {"error": {"message", "type", "param", "code"}}, as OpenAI; a malformed request is 400
/v1/systemone               {"detail": {"error_type", "message"}}, as TypeSafe; a malformed request is 422 with a list
everything else             {"detail": text}; a malformed request is 422 with a list

The list has {"loc", "msg", "type"} for each error. No answer repeats the input: it is personal, and JSON cannot
represent all of it (NaN, lone surrogates).
"""

import json

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, model_validator

OPENAI_PATHS = ("/v1/decisions", "/v1/models")
TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}


class UnicodeBody(BaseModel):
    """A request of Unicode text and finite numbers throughout, names of options and questions included."""

    @model_validator(mode="before")
    @classmethod
    def is_unicode(cls, fields):
        if isinstance(fields, bytes):  # a body of another content type than JSON, which pydantic refuses
            return fields
        try:
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise ValueError("expected Unicode text without lone surrogates") from None
        except RecursionError:
            raise ValueError("expected JSON of fewer levels") from None
        except ValueError:
            raise ValueError("expected numbers of JSON, which are finite") from None
        return fields


class Problem(BaseModel):
    detail: str | list[dict] = Field(examples=["the queue is full: 512 rows wait"])


class SystemOneError(BaseModel):
    error_type: str
    message: str


class SystemOneProblem(BaseModel):
    detail: SystemOneError | list[dict]


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(BaseModel):
    error: OpenAIError


def invalid_field(loc: tuple, message: str) -> RequestValidationError:
    """The error of a field that only the model could check. loc: the path to it, such as ("questions", "team")."""
    return RequestValidationError([{"loc": ("body", *loc), "msg": message, "type": "value_error"}])


def problem(path: str, status: int, message: str) -> dict:
    """The body of an error other than a malformed request."""
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if path.startswith(OPENAI_PATHS):
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    if path == "/v1/systemone":
        return {"detail": {"error_type": kind, "message": message}}
    return {"detail": message}


async def http_error(request: Request, error: HTTPException) -> Response:
    body = problem(request.url.path, error.status_code, error.detail)
    return Response(json.dumps(body), error.status_code, error.headers, "application/json")


async def failed(request: Request, _: Exception) -> Response:
    """An error of the server's own, whose traceback goes to its log: the message could hold text of the request."""
    return Response(json.dumps(problem(request.url.path, 500, "internal error")), 500, media_type="application/json")


async def malformed(request: Request, error: RequestValidationError) -> Response:
    detail = [{"loc": e["loc"], "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    if not request.url.path.startswith(OPENAI_PATHS):
        return Response(json.dumps({"detail": detail}), 422, media_type="application/json")
    # the place of a JSON error is a byte, not a field
    places = ["" if e["type"] == "json_invalid" else ".".join(map(str, e["loc"][1:])) for e in detail]
    said = "; ".join(f"{place}: {e['msg']}" if place else e["msg"] for place, e in zip(places, detail, strict=True))
    code = "model_not_found" if places[0] == "model" else None
    found = {"message": said, "type": "invalid_request_error", "param": places[0] or None, "code": code}
    return Response(json.dumps({"error": found}), 400, media_type="application/json")
