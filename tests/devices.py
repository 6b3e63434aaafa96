"""How tests have several devices. Without JAX, which reads this when it is imported."""

from importlib.metadata import version

# Half of the tests' time is compiling, and tiny models need no good code. The emitters that XLA got in 2025 take three
# times as long as those before them when nothing is optimized; jaxlib 0.11 has no others, and no such flag.
FAST = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FAST.append("--xla_cpu_use_fusion_emitters=false")


def simulated(devices: int) -> str:
    """$XLA_FLAGS for that many CPU devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *FAST])
