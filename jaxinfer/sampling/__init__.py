"""From sampling parameters to tokens: `SamplingParams` (what a user asks for), arrays of them, pure `sample`.

Nothing is imported here, so that `SamplingParams` is there without JAX.
"""
