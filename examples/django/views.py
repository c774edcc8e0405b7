"""Views of the ledger on Django."""

import json
from collections.abc import Awaitable, Callable

from asgiref.sync import markcoroutinefunction
from django.http import HttpRequest, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.views.decorators.http import require_GET, require_http_methods

from examples import ledger

from .db import db


@require_GET
async def account(request: HttpRequest, number: int) -> JsonResponse:
    async with db.connection() as conn:
        return JsonResponse({"id": number, "balance": await ledger.balance(conn, number)})


@require_http_methods(["GET", "POST"])
async def transfers(request: HttpRequest) -> HttpResponseBase:
    if request.method == "POST":
        return await transfer(request)
    # The pool, not a connection: a client may read slowly.
    return StreamingHttpResponse(ledger.statement(db), content_type="text/plain")


async def transfer(request: HttpRequest) -> JsonResponse:
    try:
        wanted = ledger.Transfer.of(json.loads(request.body))
    except ValueError as ex:
        raise ledger.Invalid("the body is no JSON") from ex
    async with db.connection() as conn:  # rolled back if this raises
        number = await ledger.transfer(conn, wanted)
    return JsonResponse({"id": number}, status=201)  # committed by now


class RefusedMiddleware:
    """Answers what the ledger refuses."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return await self.get_response(request)

    def process_exception(self, request: HttpRequest, ex: Exception) -> JsonResponse | None:
        if isinstance(ex, ledger.Refused):
            return JsonResponse({"detail": str(ex)}, status=ex.status)
        return None
