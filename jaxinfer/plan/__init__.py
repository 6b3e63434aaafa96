"""Does a model fit a TPU slice, and how fast can it be at best: asked of the TPU compiler, without a TPU."""
