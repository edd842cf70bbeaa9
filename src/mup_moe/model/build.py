"""Builds the model of a shape."""

from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import ModelShape
from mup_moe.model.replicas import ReplicaModel
from mup_moe.model.transformer import Transformer


def build(shape: ModelShape, settings: ModelSettings, replicas: int = 1) -> ReplicaModel:
    """Returns R replicas of our own model, or the transformers model of the shape, on the current device."""
    if shape.hub is None:
        return Transformer(shape, settings, replicas)
    # Only this branch needs transformers.
    from mup_moe.model.hub import HubModel

    return HubModel(shape, settings, replicas)
