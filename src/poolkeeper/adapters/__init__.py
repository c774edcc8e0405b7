"""
One module per framework: the pool opens and closes with the application, and requests find it.

Those of tools with workers do so with each worker process. One more is for SQLAlchemy, whose
engine takes its connections from the pool.

Import the one you need, such as ``poolkeeper.adapters.fastapi``; each is an extra of the same
name (``pip install "poolkeeper[fastapi]"``). Nothing here is loaded by ``import poolkeeper``.
"""
