"""Checked by mypy and pyright, never run: what the types of a user's program come out as."""
