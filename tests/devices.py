"""How tests have several devices, and how they compile. Without JAX, which reads this when it is imported."""

from importlib.metadata import version

# Half of the tests' time is compiling, and tiny models need no good code. The emitters that XLA got in 2025 take three
# times as long as those before them when nothing is optimized; jaxlib 0.11 has no others, and no such option.
CHEAP: dict[str, int | bool] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if version("jaxlib").startswith("0.10."):
    CHEAP["xla_cpu_use_fusion_emitters"] = False


def simulated(devices: int) -> str:
    """$XLA_FLAGS for that many CPU devices."""
    flags = {"xla_force_host_platform_device_count": devices} | CHEAP
    return " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
