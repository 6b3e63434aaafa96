"""How tests have several devices. Without JAX, which reads this when it is imported."""


def simulated(devices: int) -> str:
    """$XLA_FLAGS for that many CPU devices. Half of the tests' time is compiling, and tiny models need no good code."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
