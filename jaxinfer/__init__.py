"""jaxinfer: TPU-first inference for large models, on JAX and XLA."""
