"""Nano Lens: a true but tiny Lens that draws coloured shapes and words, small enough for the repository."""
