"""Config keys, and how config files are read."""

from .checks import auto_scale_workers, check_output_dir, check_solver, records_kept
from .defaults import add_distill_config, add_weight_config
from .lazy import (
    check_record,
    forget_record,
    is_of_distillation,
    is_record,
    load_lazy_config,
    override,
    read_record,
    write_record,
)
from .loading import (
    CLASS_NODES,
    detector_config,
    drop_backbone_weights,
    family,
    import_modules,
    load_config,
    merge_distill_node,
    num_classes,
    plain_config,
    resolve_config_file,
    slim_config,
    student_config,
    variant_config,
)

__all__ = [
    "CLASS_NODES",
    "add_distill_config",
    "add_weight_config",
    "auto_scale_workers",
    "check_output_dir",
    "check_record",
    "check_solver",
    "detector_config",
    "drop_backbone_weights",
    "family",
    "forget_record",
    "import_modules",
    "is_of_distillation",
    "is_record",
    "load_config",
    "load_lazy_config",
    "merge_distill_node",
    "num_classes",
    "override",
    "plain_config",
    "read_record",
    "records_kept",
    "resolve_config_file",
    "slim_config",
    "student_config",
    "variant_config",
    "write_record",
]
