"""The methods' formulas, as pure functions of tensors. All of them compute in float32."""

from .precision import in_float32
from .review import hierarchical_context_loss

__all__ = ["hierarchical_context_loss", "in_float32"]
