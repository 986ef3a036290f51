"""Broken and hostile files, thousands of them, each made again from its number, and what opens them.

``python -m tests.fuzz.worker FOLDER FIRST COUNT [SEED]`` runs some by hand.
"""
