"""Emulated hardware for guests without enlightenments: the slow path, counted honestly."""
