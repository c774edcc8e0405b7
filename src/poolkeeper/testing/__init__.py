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
from ._sandbox import Sandbox, outside, sandbox
from ._servers import EmbeddedServer, Template, server

__all__ = [
    "EmbeddedServer",
    "LeftBehindError",
    "OwnershipError",
    "Sandbox",
    "SandboxError",
    "Template",
    "outside",
    "sandbox",
    "server",
]
