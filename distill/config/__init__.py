"""Config keys, and how config files are read."""

from .checks import check_output_dir, check_solver, scale_iterations
from .defaults import add_distill_config, add_weight_config
from .loading import (
    CLASS_NODES,
    detector_config,
    import_modules,
    load_config,
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
    "check_output_dir",
    "check_solver",
    "detector_config",
    "import_modules",
    "load_config",
    "num_classes",
    "plain_config",
    "resolve_config_file",
    "scale_iterations",
    "slim_config",
    "student_config",
    "variant_config",
]
