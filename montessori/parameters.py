"""The parameters that count."""

from __future__ import annotations

from torch import nn


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those with `requires_grad`, by name; one that is shared has its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
