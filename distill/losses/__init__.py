"""The methods' formulas, as pure functions of tensors. All of them compute in float32."""

from .imitation import imitation_loss, region_weights
from .precision import in_float32
from .review import hierarchical_context_loss
from .structural import structural_loss, structural_similarity, structural_similarity_terms

__all__ = [
    "hierarchical_context_loss",
    "imitation_loss",
    "in_float32",
    "region_weights",
    "structural_loss",
    "structural_similarity",
    "structural_similarity_terms",
]
