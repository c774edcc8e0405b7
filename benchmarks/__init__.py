"""
poolkeeper beside psycopg_pool, asyncpg's pool and SQLAlchemy's engine, in one run.

``make bench``, or ``python -m benchmarks``. `measure` runs in a process for each event loop and
prints JSON; `report` and `plot` make ``docs/benchmarks.md`` and ``docs/benchmarks.svg`` of it.
"""
