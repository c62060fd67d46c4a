"""Models by name: a folder that is not there and a hub that cannot be reached are said at once, not after retries."""

import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from distill.files import UserError


def look_up(name):
    """Before the hub is asked for `name`: UserError where only a folder can be meant and there is none.

    A hub whose address has no answer is not asked at all: its cache may do. Left to itself huggingface_hub tries six
    times, half a minute, for each file.
    """
    path = Path(name)
    if path.exists():
        return
    if path.is_absolute() or len(path.parts) > 2 or str(name).startswith((".", "~", "runs/")):
        raise UserError(f"{name}: no such folder; expected a trained adapter, a model folder or a hub id")
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies().keys() & {"https", "http", "all"}:
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
