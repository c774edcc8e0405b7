"""
The states of a session as libpq tells them.
"""

from __future__ import annotations

from psycopg import pq

IDLE = pq.TransactionStatus.IDLE
ACTIVE = pq.TransactionStatus.ACTIVE
INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR
UNKNOWN = pq.TransactionStatus.UNKNOWN

BAD = pq.ConnStatus.BAD
NO_PIPELINE = pq.PipelineStatus.OFF
