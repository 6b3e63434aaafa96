"""Checkpoints in Hugging Face's format: found (hub), checked (files, folder), read (safetensors) and loaded (load), to
where they stay (memory)."""
