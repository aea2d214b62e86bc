"""Tasks: rows -> messages to train on or to ask, and the checks of what a model answers."""
