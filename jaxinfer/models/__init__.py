"""One short file per architecture over shared blocks; `registry.py` says which there are."""
