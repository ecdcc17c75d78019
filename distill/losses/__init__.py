"""The methods' formulas, as pure functions of tensors. All of them compute in float32."""

from .aligned import aligned_loss
from .channel_wise import channel_wise_loss
from .cross_head import align_scale, cross_box_loss, cross_class_loss
from .focal_global import attention_maps, focal_losses, focal_weights
from .global_knowledge import (
    box_levels,
    box_mask,
    box_means,
    global_knowledge_loss,
    local_knowledge_loss,
    prototype_robustness,
    prototype_similarity,
)
from .imitation import imitation_loss, region_weights
from .logit import box_overlap, decoupled_divergence, quality_focal_loss, soft_label_divergence
from .masked_generative import generation_loss, random_cells
from .pearson import pearson_loss
from .precision import in_float32
from .review import hierarchical_context_loss
from .structural import structural_loss, structural_similarity, structural_similarity_terms

__all__ = [
    "align_scale",
    "aligned_loss",
    "attention_maps",
    "box_levels",
    "box_mask",
    "box_means",
    "box_overlap",
    "channel_wise_loss",
    "cross_box_loss",
    "cross_class_loss",
    "decoupled_divergence",
    "focal_losses",
    "focal_weights",
    "generation_loss",
    "global_knowledge_loss",
    "hierarchical_context_loss",
    "imitation_loss",
    "in_float32",
    "local_knowledge_loss",
    "pearson_loss",
    "prototype_robustness",
    "prototype_similarity",
    "quality_focal_loss",
    "random_cells",
    "region_weights",
    "soft_label_divergence",
    "structural_loss",
    "structural_similarity",
    "structural_similarity_terms",
]
