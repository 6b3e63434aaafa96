"""`SentenceTransformer` and `CrossEncoder`: the methods and arguments of their namesakes in sentence-transformers, for
programs that are written for these. What comes back is NumPy's."""
