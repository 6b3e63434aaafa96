"""Requests in, tokens out: who runs when (`scheduler`), where keys and values lie (`pages`), what is compiled
(`runner`), and the loop over them (`engine`)."""
