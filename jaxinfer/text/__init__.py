"""Text in and out: tokenizers, chat templates, incremental detokenizing and stop strings, all on the host."""
