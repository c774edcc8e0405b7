"""Settings of the ledger on Django."""

import os

SECRET_KEY = os.environ.get("SECRET_KEY", "only for an example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "examples.django.urls"
ASGI_APPLICATION = "examples.django.app.app"
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "examples.django.views.RefusedMiddleware",
    "examples.django.middleware.Exhausted",
]
