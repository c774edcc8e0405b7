"""The ledger on Django: what is called asgi.py in a project."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from django.core.asgi import get_asgi_application

from examples import ledger
from poolkeeper.adapters.asgi import LifespanMiddleware

from .db import db

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django.settings")


@asynccontextmanager
async def prepare(app: object) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


app = LifespanMiddleware(
    get_asgi_application(),
    db,
    prepare,
    livez="/livez",
    readyz="/readyz",
    open_on_first_request=True,  # for daphne and runserver; other servers say when they start
)
