"""The engine of models that keep no cache: whole texts in, a vector or the logits of classes of each out."""
