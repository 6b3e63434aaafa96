"""How large tables of grammars may be on a device, and what their states say; see tables.py."""

BLOCKS, BLOCK = 16, 128  # blocks of states, and states of a block
CLASSES = 1024  # of tokens that lead to the same states
GOES_ON, FORCED, COMPLETE = 0, 1, 2  # what can follow in a state: several texts; one text, without a choice; nothing
