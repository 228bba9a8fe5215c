"""How good edits are, and what they cost: rows of methods over edits of held-back scenes (``fisedit eval``).

``cases.py`` has the edits, ``rows.py`` the methods (a new one is one entry), ``measures.py`` what is measured of a
picture, ``folder.py`` what is kept of a run, ``evaluation.py`` the run, ``summary.py`` what it comes to.
"""
