"""Who may ask: everyone, or with API_KEY set, requests that carry it."""

import hmac
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from distill.files import sha256


async def check_key(
    request: Request,
    key: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
):
    """401 if API_KEY is set and the request carries it in neither header. The comparison takes constant time."""
    expected = request.app.state.engine.settings.api_key
    given = key or (bearer.credentials if bearer else "")
    if expected and not hmac.compare_digest(sha256(given), sha256(expected)):
        detail = "header Authorization: Bearer or X-API-Key: missing or wrong"
        raise HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


async def check_operator(request: Request, _: Annotated[None, Depends(check_key)]):
    """403 if the server has no API_KEY: otherwise anyone could operate it."""
    if not request.app.state.engine.settings.api_key:
        raise HTTPException(403, "expected a server that was started with API_KEY")
