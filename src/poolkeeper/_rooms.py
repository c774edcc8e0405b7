"""
All that a pool in use needs, and of it what the pool's face asks for, through the `_door`.
"""

from __future__ import annotations

from ._acquiring import take as take
from ._acquiring import wait_for_connection as wait_for_connection
from ._binding import beginning as beginning
from ._block import Block as Block
from ._block import CheckoutContext as CheckoutContext
from ._block import with_cursor as with_cursor
from ._block import with_transaction as with_transaction
from ._checkouts import Checkout as Checkout
from ._classes import require_class as require_class
from ._closing import close as close
from ._events import listeners_of as listeners_of
from ._life import Life as Life
from ._oneshots import by_lane as by_lane
from ._opening import note_opened as note_opened
from ._opening import open_in_constructor as open_in_constructor
from ._opening import open_pool as open_pool
from ._opening import until_ready as until_ready
from ._releasing import release as release
from ._releasing import take_back_dropped as take_back_dropped
from ._reporting import counts as counts
from ._reporting import diagnose as diagnose
from ._reporting import measures as measures
from ._reporting import numbers as numbers
from ._reporting import snapshot as snapshot
from ._shot import ALL_ROWS as ALL_ROWS
from ._shot import FIRST_ROW as FIRST_ROW
from ._shot import ROWCOUNT as ROWCOUNT
from ._shot import Fetch as Fetch
from ._shot import OneShot as OneShot
from ._shot import by_cursor as by_cursor
from ._stock import drain as drain
from ._stock import resize as resize
from ._watching import check as check
from ._watching import look_at_idle as look_at_idle
from .errors import hide_from_pytest

hide_from_pytest()
