"""
The commands of ``poolkeeper`` that ask a server or a running process, a module for each.

Each has ``add_parser()``, which says what it takes, and imports the rest when it runs.
"""
