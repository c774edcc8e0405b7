"""Each test of an example has a database of its own, which the application finds as usual."""

import pytest


@pytest.fixture(autouse=True)
def database_url(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DATABASE_URL", database)
    return database
