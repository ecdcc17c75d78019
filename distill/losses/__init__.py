"""The methods' formulas, as pure functions of tensors. All of them compute in float32."""

from .aligned import aligned_loss
from .global_knowledge import (
    box_levels,
    box_mask,
    box_means,
    global_knowledge_loss,
    local_knowledge_loss,
    prototype_robustness,
    prototype_similarity,
    response_loss,
)
from .imitation import imitation_loss, region_weights
from .precision import in_float32
from .review import hierarchical_context_loss
from .structural import structural_loss, structural_similarity, structural_similarity_terms

__all__ = [
    "aligned_loss",
    "box_levels",
    "box_mask",
    "box_means",
    "global_knowledge_loss",
    "hierarchical_context_loss",
    "imitation_loss",
    "in_float32",
    "local_knowledge_loss",
    "prototype_robustness",
    "prototype_similarity",
    "region_weights",
    "response_loss",
    "structural_loss",
    "structural_similarity",
    "structural_similarity_terms",
]
