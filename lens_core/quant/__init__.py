"""Packed weight formats and their plain-torch definitions."""
