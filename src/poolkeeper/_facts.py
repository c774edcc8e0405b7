"""
The facts about a pool and what is made of them, for those who only name them; see `_later`.

To make their classes takes as long as to import all that `import poolkeeper` loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._later import later

if TYPE_CHECKING:
    from ._diagnosis import Diagnosis as Diagnosis
    from ._diagnosis import Finding as Finding
    from ._snapshot import CheckoutRow as CheckoutRow
    from ._snapshot import Health as Health
    from ._snapshot import LoadRow as LoadRow
    from ._snapshot import PoolSnapshot as PoolSnapshot
    from ._snapshot import ServerFacts as ServerFacts
    from ._snapshot import WaiterRow as WaiterRow
else:
    __getattr__ = later(__name__, "._snapshot", "._diagnosis")
