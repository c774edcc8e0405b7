"""
Everything at once, for as long as you like; afterwards nothing may be missing, or left over.

``python -m tests.soak --time 60 --seed 1`` starts a server and a proxy in a process of their own
(`outside`), lets borrowers of every kind (`clients`, `messes`) work on two pools while a monkey
(`monkey`) troubles them, and looks in its quiet moments at what must hold (`book`, `leftovers`).
`run` has the order of events, `report` says how it went.
"""
