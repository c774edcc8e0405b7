"""Settings of the ledger on Django."""

import os

SECRET_KEY = os.environ.get("SECRET_KEY", "only for an example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "examples.django.urls"
ASGI_APPLICATION = "examples.django.app.app"
# Each of them async, so that a request stays on the event loop.
MIDDLEWARE = ["examples.django.views.RefusedMiddleware"]
