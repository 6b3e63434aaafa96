"""How setuptools builds the kernels: pyproject.toml names this class. Loaded by itself, without the package."""

from pathlib import Path

import jaxlib
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """With the headers of the jaxlib that is there."""

    def finalize_options(self) -> None:
        """Called once the options are known."""
        super().finalize_options()
        self.include_dirs.append(str(Path(jaxlib.__file__).with_name("include")))
