"""
How large a pool should be: what was recorded, what an acquire would wait for, and a fleet.

None of it is loaded by ``import poolkeeper``.
"""

from ._advice import Advice, SizeRow, advise
from ._fleet import Fleet
from ._plot import plot
from ._recording import Recording, advise_on, record
from ._replay import Waits
from ._simulation import FleetRow, Server, simulate
from ._workload import Use, Workload

__all__ = [
    "Advice",
    "Fleet",
    "FleetRow",
    "Recording",
    "Server",
    "SizeRow",
    "Use",
    "Waits",
    "Workload",
    "advise",
    "advise_on",
    "plot",
    "record",
    "simulate",
]
