"""What a config file says, be it yaml or Python: the detector, its weights, its data, its optimizer, its evaluator.

Everything else (the model, the distillers, the hooks, the loop) is the same for both.
"""

from .base import Recipe, as_recipe, load_recipe
from .lazy_recipe import LazyRecipe
from .translate import explain, translate_message
from .yaml_recipe import YamlRecipe

__all__ = ["LazyRecipe", "Recipe", "YamlRecipe", "as_recipe", "explain", "load_recipe", "translate_message"]
