"""
For tests: a sandbox that takes back what a test has done.

```python
@pytest.fixture
async def db():
    async with sandbox(manager):
        yield manager
```
"""

from ._errors import LeftBehindError, OwnershipError, SandboxError
from ._faults import exhausted, kill_idle, kill_sessions, logins_refused, stopped
from ._proxy import FaultProxy
from ._sandbox import Sandbox, outside, sandbox
from ._servers import EmbeddedServer, Template, server

__all__ = [
    "EmbeddedServer",
    "FaultProxy",
    "LeftBehindError",
    "OwnershipError",
    "Sandbox",
    "SandboxError",
    "Template",
    "exhausted",
    "kill_idle",
    "kill_sessions",
    "logins_refused",
    "outside",
    "sandbox",
    "server",
    "stopped",
]
