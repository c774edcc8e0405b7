"""
What ``poolkeeper demo`` shows.

``app`` is a small program that does it right, ``mistakes`` holds the programs that do it wrong,
``catalogue`` says what each mistake is and reads what came of it, ``programs`` runs them,
``narration`` prints, ``show`` puts it together. Nothing in the library imports any of it.
"""
