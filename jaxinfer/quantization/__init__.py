"""Weights in fewer bits: the schemes that there are (schemes), and what layers take in place of arrays (qarray)."""
