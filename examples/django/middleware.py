"""What Django does about an error of a view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse, JsonResponse

from poolkeeper import NoConnectionError


class Exhausted:
    """Answers 503 where no connection could be had."""

    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if not isinstance(error, NoConnectionError):
            return None
        headers = {"Retry-After": "5", "Cache-Control": "no-store"}
        return JsonResponse({"detail": "Service Unavailable"}, status=503, headers=headers)
