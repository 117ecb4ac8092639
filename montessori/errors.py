"""Errors for people: one line saying what was expected, what came, where, and what to do."""

from __future__ import annotations


class FallbackWarning(UserWarning):
    """Something is scored by a slower way than there may be, with the same result."""


class CurvatureWarning(UserWarning):
    """Linear predictions of the reference loss may be rough: it bends over one step, or autograd is kept from its
    derivative."""


class IdleWarning(UserWarning):
    """Trainable parameters do not take part in the loss: of any text, and are held fixed, or of some candidates."""


class DataWarning(UserWarning):
    """A part of some rows does not stand in the text that the model is given."""


class MontessoriError(ValueError):
    """Base of every error this package raises on purpose. `str(error)` is one line."""


class ArgumentError(MontessoriError):
    """An argument of a public function has the wrong type, shape, dtype, device or value."""


class DataError(MontessoriError):
    """A row of the candidates or of the reference cannot be used; the message names file and line."""


class StateError(MontessoriError):
    """The optimizer state does not belong to the model; the message names the parameter."""


class ModelError(MontessoriError):
    """The model cannot be scored or loaded; the message names the model or the parameter."""


class NonFiniteLossError(ModelError):
    """The loss of a reference row is NaN or infinite."""


class UntrainedLossError(ModelError):
    """The loss depends on no parameter that is trained."""


class ResourceError(MontessoriError):
    """Memory, disk or a batch budget ran out; the message says how much was asked for."""
