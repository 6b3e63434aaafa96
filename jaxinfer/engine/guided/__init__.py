"""Outputs that match a grammar: llguidance says which tokens may come next, and this is what it is asked with."""
