"""Weights in fewer bits: the schemes that there are, formats of checkpoints, quantizing and calibrating on the host."""
