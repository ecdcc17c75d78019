"""Loading weights, with errors that say what is wrong with the file."""

import copy
import pickle
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from ..config import drop_backbone_weights
from ..errors import DistillError
from ..recipes import Recipe, YamlRecipe, as_recipe

# Batch norm's step counter is bookkeeping: old checkpoints lack it and nothing is computed from it.
_COUNTER = ".num_batches_tracked"
# A distilled checkpoint holds the distillers' weights, too, which a detector alone has no use for.
_DISTILLERS = "distillers."
# Whose .pkl files are known; they hold nothing but arrays, in the pickles of several decades
_TRUSTED = ("detectron2://", "https://dl.fbaipublicfiles.com/", "catalog://")
_ARRAYS = {"_reconstruct", "_frombuffer", "ndarray", "dtype", "scalar"}  # of numpy, by which arrays are pickled


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, text, numbers and numpy's arrays, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.split(".")[0] == "numpy" and name in _ARRAYS
        if is_array or (module, name) in (("collections", "OrderedDict"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise DistillError(f"it would run {module}.{name}")


class WeightsCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which refuses a .pkl file that would run code when it is read. (Of other files torch
    reads tensors alone.) Those of Detectron2's model zoo are trusted."""

    _source = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        """See Detectron2's.

        Raises:
            DistillError: the file is a .pkl and holds something else than arrays.
        """
        self._source = path or ""
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl") and not self._source.startswith(_TRUSTED):
            try:
                with PathManager.open(filename, "rb") as f:
                    _ArrayUnpickler(f, encoding="latin1").load()
            except Exception as error:  # damaged bytes make pickle raise almost anything
                raise DistillError(
                    f"The weights {self._source!r} are not read: {error}. A .pkl file of weights holds dicts of numpy "
                    "arrays. If you trust this one, load it, and save {'model': its arrays as tensors, "
                    "'matching_heuristics': True} by torch.save as a .pth."
                ) from error
        return super()._load_file(filename)


class StrictCheckpointer(WeightsCheckpointer):
    """Loads whatever Detectron2 loads into a model, and refuses a file that does not fill all of it.

    Args:
        model: the model to fill.
        role: what the model is, for the messages, such as "teacher".
    """

    def __init__(self, model: nn.Module, role: str) -> None:
        super().__init__(model, save_to_disk=False)
        self.role = role

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        """Loads a checkpoint.

        Args:
            path: a file or a URL.

        Returns:
            What the checkpoint holds beside the model.

        Raises:
            DistillError: there is no such file, it cannot be read, it leaves some weight unset, or it is of a deeper
                backbone.
        """
        self._source = path
        try:
            local = PathManager.get_local_path(path.partition("?")[0])
            with open(local, "rb"):
                pass
        except Exception as error:  # whatever a download or the file system raises
            raise DistillError(
                f"The {self.role}'s weights {path!r} cannot be read: {error}. Give an existing file or a URL that "
                "this machine reaches."
            ) from error
        try:
            return super().load(path, *args, **kwargs)
        except DistillError:
            raise
        except (ValueError, AssertionError) as error:  # fvcore's, of what is no tensor; Detectron2's, of no such file
            raise DistillError(
                f"The {self.role}'s weights {path!r} cannot be loaded: {str(error).strip() or type(error).__name__}: "
                "expected a Detectron2 checkpoint ({'model': {name: tensor}})."
            ) from error

    def _load_file(self, filename: str) -> dict:
        try:
            # torch.load defaults to weights_only=True: nothing in a .pth is executed
            loaded = super()._load_file(filename)
        except DistillError:
            raise
        except Exception as error:  # damaged bytes make torch and pickle raise almost anything
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise DistillError(
                f"The {self.role}'s weights {self._source!r} are not a readable checkpoint: {reason} Is the file "
                "complete (truncated downloads are common) and does it hold tensors only?"
            ) from error
        if not isinstance(loaded.get("model"), dict) or not loaded["model"]:
            raise DistillError(
                f"The {self.role}'s weights {self._source!r} hold no state dict: expected a Detectron2 checkpoint "
                "({'model': {name: tensor}})."
            )
        state = loaded["model"]
        for key in [key for key in state if key.startswith(_DISTILLERS)]:
            del state[key]
        return loaded

    def _load_model(self, checkpoint: dict) -> Any:
        by_name = not checkpoint.get("matching_heuristics", False)
        given = {key.removeprefix("module.") for key in checkpoint["model"]}
        incompatible = super()._load_model(checkpoint)
        if by_name:  # FrozenBN does not report buffers that it fills in by itself
            absent = self.model.state_dict().keys() - given
            incompatible.missing_keys[:] = sorted(absent | set(incompatible.missing_keys))
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        shapes = incompatible.incorrect_shapes
        # a weight of another shape is not loaded, so it is among the missing ones, too
        misshapen = {name for name, _, _ in shapes}
        missing = [k for k in incompatible.missing_keys if not k.endswith(_COUNTER) and k not in misshapen]
        # heads that the model does not have (a mask head, say) may be left over, parts of a backbone may not
        deeper = [k for k in incompatible.unexpected_keys if k.startswith("backbone.") and not k.endswith(_COUNTER)]
        if missing or shapes or deeper:
            examples = [f"{name} is {have}, not {want}" for name, have, want in shapes]
            examples += [f"{name} is missing" for name in missing] + [f"{name} is left over" for name in deeper]
            raise DistillError(
                f"The {self.role} would not be fully loaded from {self._source!r}: of its "
                f"{len(self.model.state_dict())} weights, {len(missing)} are missing and {len(shapes)} have another "
                f"shape; {len(deeper)} of the file's backbone are left over. The first: {'; '.join(examples[:5])}. Are "
                "these the weights of this very architecture?"
            )
        super()._log_incompatible_keys(incompatible)


def load_detector(source: CfgNode | Recipe, role: str) -> nn.Module:
    """Builds a detector and loads its weights into all of it.

    Args:
        source: the detector's own config, without distillation, or its recipe. MODEL.WEIGHTS names the weights.
        role: what it is, for the messages, such as "teacher".

    Returns:
        The detector, on MODEL.DEVICE, in training mode.

    Raises:
        DistillError: the weights cannot be read, or leave some of the detector unset.
    """
    recipe = as_recipe(source)
    weights = recipe.cfg.MODEL.WEIGHTS
    if isinstance(recipe, YamlRecipe):
        cfg = recipe.cfg.clone()
        cfg.defrost()
        drop_backbone_weights(cfg)  # they would be overwritten at once, and may have to be downloaded
        recipe = copy.copy(recipe)  # of its own class
        recipe.cfg = cfg
    model = recipe.build_detector()
    StrictCheckpointer(model, role).load(weights)
    return model


def describe_weights(cfg: CfgNode) -> str:
    """Says where a detector's weights come from, for the log.

    Args:
        cfg: the detector's config.

    Returns:
        A file, the name of timm's weights, or "random weights".
    """
    if cfg.MODEL.WEIGHTS:
        return cfg.MODEL.WEIGHTS
    if cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone" and cfg.MODEL.TIMM.WEIGHTS:
        return f"timm's {cfg.MODEL.TIMM.NAME}, {cfg.MODEL.TIMM.WEIGHTS}"
    return "random weights"
