"""The CPU kernels, which are built where there is a C++ compiler; without them XLA does all."""

from pathlib import Path

import jaxlib
from setuptools import Extension, setup

FOLDER = Path("jaxinfer/kernels/cpu")

setup(
    ext_modules=[
        Extension(
            "jaxinfer.kernels.cpu._kernels",
            [str(FOLDER / "handlers.cc")],
            depends=[str(FOLDER / "micro.h"), "setup.py"],
            include_dirs=[str(Path(jaxlib.__file__).with_name("include"))],
            extra_compile_args=["-std=c++17", "-O3", "-g0"],
            language="c++",
            optional=True,
        )
    ]
)
