"""The deployments that come with the project, and their models."""

import functools
from pathlib import Path

from jaxinfer.engine.deployment import Deployment, read_deployment
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.fit import model_of

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*"))


def deployment_of(name: str) -> Deployment:
    return read_deployment(FILES[0].parent / f"{name}.yaml")


def model_of_deployment(deployment: Deployment) -> AbstractModel:
    return _model(deployment.model, deployment.options.get("quantization"))


@functools.cache  # it takes seconds, and some are of several deployments
def _model(name: str, quantization: str | None) -> AbstractModel:
    architecture = next(d.architecture for d in map(read_deployment, FILES) if d.model == name)
    assert architecture
    return model_of(architecture, quantization=quantization)
