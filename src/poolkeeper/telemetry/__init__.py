"""
What a pool does, for OpenTelemetry and for Prometheus; each module needs the extra of its name.

They subscribe to the pool's events (`PoolManager.subscribe()`), use poolkeeper's public names
only, and are loaded by nobody but their users.
"""
