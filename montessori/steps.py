"""The optimizer steps that can be scored: small options objects without tensors.

`step` is t of Eq. 1 everywhere: the 1-based index of the step about to be taken, that is the step
count saved by the optimizer plus one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from montessori.errors import ArgumentError


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ArgumentError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True)
class AdamWStep:
    """Hyperparameters of one Adam or AdamW step (Eq. 1) for one parameter.

    `decoupled=True` is AdamW (weight decay acts on the parameter), `decoupled=False` is Adam with
    L2 regularisation (weight decay is added to the gradient). `lr` and `eps` have the units of
    `torch.optim.AdamW`.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: int = 1
    decoupled: bool = True

    def __post_init__(self) -> None:
        _require(_is_finite(self.lr) and self.lr >= 0, "lr", self.lr, "a finite number >= 0")
        _require(_is_finite(self.beta1) and 0 <= self.beta1 < 1, "beta1", self.beta1, "0 <= beta1 < 1")
        _require(_is_finite(self.beta2) and 0 <= self.beta2 < 1, "beta2", self.beta2, "0 <= beta2 < 1")
        _require(_is_finite(self.eps) and self.eps >= 0, "eps", self.eps, "a finite number >= 0")
        _require(_is_finite(self.weight_decay), "weight_decay", self.weight_decay, "a finite number")
        _require(
            isinstance(self.step, int) and self.step >= 1,
            "step",
            self.step,
            "a 1-based integer, the index of the step about to be taken",
        )

    @property
    def folded(self) -> tuple[float, float, float, float, float]:
        """a1, a2, s1, s2, ε' with m̂ / (√v̂ + ε) = (a1 m + a2 g) / (√(s1 v + s2 g²) + ε'), m̂ = m'/(1−β1^t) and
        v̂ = v'/(1−β2^t) (Eq. 1).

        s1 is at most 1: in the first steps v̂ may be a thousand times v, beyond float32, and torch never forms it.
        """
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        by = max(1.0, self.beta2 / correction2)
        scale = correction1 * math.sqrt(by)
        return (
            self.beta1 / scale,
            (1 - self.beta1) / scale,
            self.beta2 / correction2 / by,
            (1 - self.beta2) / correction2 / by,
            self.eps / math.sqrt(by),
        )


@dataclass(frozen=True)
class SGDStep:
    """Hyperparameters of one `torch.optim.SGD` step for one parameter.

    With momentum, the momentum buffer takes the place of `exp_avg`; `step=1` means that there is no
    buffer yet and the gradient becomes the buffer undamped, as in torch.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        _require(_is_finite(self.lr) and self.lr >= 0, "lr", self.lr, "a finite number >= 0")
        _require(_is_finite(self.momentum) and self.momentum >= 0, "momentum", self.momentum, "a finite number >= 0")
        _require(_is_finite(self.dampening), "dampening", self.dampening, "a finite number")
        _require(_is_finite(self.weight_decay), "weight_decay", self.weight_decay, "a finite number")
        _require(isinstance(self.step, int) and self.step >= 1, "step", self.step, "a 1-based integer")
        damped = not self.momentum or self.dampening
        _require(not (self.nesterov and damped), "nesterov", self.nesterov, "momentum without dampening, as torch does")

    def line(self, buffered: bool) -> tuple[float, float]:
        """(a, b) with Δ(g) = −lr · (a (g + λθ) + b · buffer); `buffered` where there is a momentum buffer.

        The new buffer is μ·buffer + ρ (g + λθ); the step follows it, or looks ahead of it (Nesterov).
        """
        if not self.momentum:
            return 1.0, 0.0
        share = 1 - self.dampening if buffered else 1.0
        if self.nesterov:
            return 1 + self.momentum * share, self.momentum**2 if buffered else 0.0
        return share, self.momentum if buffered else 0.0


OptimizerStep = AdamWStep | SGDStep
