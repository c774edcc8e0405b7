"""The pool of the ledger on Django, for all modules to import."""

import os

from poolkeeper import PoolManager

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
