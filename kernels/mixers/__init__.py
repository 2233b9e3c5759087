"""Mixers: the part of a layer that reads and writes a sequence's state; a folder for each model family."""
