"""Tiny random models with Lens' architecture, in every layout that the loaders read.

``python -m lens_core.tiny OUT_DIR --seed 0`` writes them in the shape of ComfyUI's models folder.
They draw nothing sensible; they exist so that everything but the pictures can be tested, on any
machine, in seconds.
"""
