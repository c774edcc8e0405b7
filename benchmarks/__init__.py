"""
poolkeeper beside psycopg_pool, asyncpg's pool and SQLAlchemy's engine, in one run.

``make bench``, or ``python -m benchmarks``. `contests` says what is measured beside whom, and what
is to be reached; `turns` runs each contestant in a process of its own: those of `pools`, `clients`
and `endpoints`. `measure` and `storm` measure what is no contest. `report` and `plot` make
``docs/benchmarks.md`` and ``docs/benchmarks.svg`` of it all.
"""
