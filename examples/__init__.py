"""
The same small application for each framework: a ledger of accounts and transfers.

`ledger` has the SQL and knows no framework; ``<framework>/app.py`` is the application, and
``<framework>/test_app.py`` its tests. Run one from the directory above:
``DATABASE_URL=postgresql://... uvicorn examples.fastapi.app:app``.
"""
