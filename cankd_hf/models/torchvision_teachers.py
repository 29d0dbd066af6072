"""torchvision's detectors and segmentation models as teachers: their own weights, tapped at the backbone's outputs."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection, get_model, get_model_weights, list_models, segmentation

from cankd_hf.errors import InputError
from cankd_hf.models.configs import nearest
from cankd_hf.models.unreadable import NOT_LOADED
from cankd_hf.names import TORCHVISION as PREFIX

MULTIPLE = 32  # torchvision's detectors pad the images of a batch to it, at the right and bottom
# Prefixes of the same parts in torchvision and in `FPNForObjectDetection`, for `student.inherit`.
_OURS = {
    **{"backbone.fpn.": "neck.pyramid.", "head.": "head.head.", "rpn.": "head.rpn."},
    **{"roi_heads.mask_head.": "head.mask_branch.head.", "roi_heads.mask_predictor.": "head.mask_branch.predictor."},
    "roi_heads.": "head.roi_heads.",
}


class TorchvisionNet(nn.Module):
    """The modules of a torchvision model under its own names, run as far as its maps, without resizing the images.

    A detector's maps are those of its `backbone`, which is backbone and pyramid, fine to coarse; its
    `GeneralizedRCNNTransform` (a resize to 800 pixels and a normalisation) is left out. A segmentation model's map is
    the last of its backbone. `taps` are in the syntax of `Taps`, `image_mean` and `image_std` for pixels in 0..1.
    """

    backbone: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        transform = getattr(model, "transform", None)
        self.pads = transform is not None
        self.taps = ["backbone" if self.pads else "backbone:out"]
        # The segmentation models are trained with ImageNet's statistics, but do not hold them.
        self.image_mean = tuple(transform.image_mean) if transform is not None else (0.485, 0.456, 0.406)
        self.image_std = tuple(transform.image_std) if transform is not None else (0.229, 0.224, 0.225)
        for name, module in model.named_children():
            if name != "transform":
                self.add_module(name, module)

    def map_frame(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the images, and of the area that the maps cover."""
        multiple = MULTIPLE if self.pads else 1
        return size, (size[0] + -size[0] % multiple, size[1] + -size[1] % multiple)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Normalised images `[B, 3, H, W]` -> maps `[B, C, h, w]` by torchvision's names."""
        height, width = pixel_values.shape[-2:]
        _, covered = self.map_frame((height, width))
        return self.backbone(F.pad(pixel_values, (0, covered[1] - width, 0, covered[0] - height)))

    def state_as_ours(self) -> dict[str, Tensor]:
        """Its tensors under the names of the same parts in `FPNForObjectDetection`."""
        state: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            prefix = next((theirs for theirs in _OURS if name.startswith(theirs)), "")
            state[_OURS.get(prefix, "") + name.removeprefix(prefix)] = value
        return state


def load_torchvision(name: str, weights: str | None = None, revision: str | None = None) -> tuple[TorchvisionNet, str]:
    """The modules of a torchvision model with trained weights; arguments and errors as of `load_whole`."""
    model, source = load_whole(name, weights, revision)
    return TorchvisionNet(model), source


def load_whole(name: str, weights: str | None = None, revision: str | None = None) -> tuple[nn.Module, str]:
    """A whole torchvision model with trained weights, loaded strictly, and the name of its weights.

    Args:
        name: `torchvision/NAME`, such as `torchvision/retinanet_resnet50_fpn_v2`.
        weights: a `.safetensors` or `.pth` file (a plain state dict, read without unpickling code) of the same
            architecture, for any number of classes; its norms have the epsilon of a model that torchvision builds
            untrained. None takes torchvision's own, downloaded once into torch's cache.
        revision: which of torchvision's own (`COCO_V1`); None: its default.

    Raises:
        InputError: for an unknown name, unavailable weights, and weights that do not fit (keys are listed).
    """
    place = f"teacher {name}"
    net = name.removeprefix(PREFIX)
    known = list_models(module=detection) + list_models(module=segmentation)
    if net not in known:
        hint = nearest(net, known).replace("mean ", f"mean {PREFIX}") or f"; known: {', '.join(known)}"
        raise InputError(f"{place}: torchvision has no such detector or segmentation model{hint}")
    if weights is not None:
        return _from_file(place, net, Path(weights)), Path(weights).name
    choices = get_model_weights(net)
    if revision is not None and revision not in choices.__members__:
        raise InputError(
            f"teacher.revision: expected one of {', '.join(entry.name for entry in choices)}, got {revision!r}"
        )
    chosen = choices.DEFAULT if revision is None else choices[revision]
    try:
        # Downloaded and read without unpickling code; torchvision then reads the same file again, because its
        # builder selects the norms and the epsilon that these weights were trained with.
        chosen.get_state_dict(weights_only=True, check_hash=True, map_location="cpu")
        model = get_model(net, weights=chosen)
    except (OSError, pickle.UnpicklingError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
        raise InputError(
            f"{place}: its weights are not available ({_line(error)}); allow the download, or put {chosen.url} at "
            f"{file}, or name the file as `weights` beside the model"
        ) from error
    except RuntimeError as error:
        raise InputError(f"{place}: torchvision's weights do not fit: {_line(error, 600)}") from error
    return model, chosen.name


def _from_file(place: str, net: str, file: Path) -> nn.Module:
    """The model with the weights of a file and their number of classes."""
    state = _read(file)
    classes = len(get_model_weights(net).DEFAULT.meta["categories"])
    with torch.device("meta"):
        shapes = _untrained(net, classes).state_dict()
    # Every tensor of another shape belongs to the classifier: so many rows for each class.
    other = [key for key in shapes if key in state and state[key].shape != shapes[key].shape]
    counts = {
        state[key].shape[0] * classes / shapes[key].shape[0] if state[key].ndim and shapes[key].ndim else 0.0
        for key in other
    }
    if len(counts) == 1 and (found := counts.pop()) > 0 and found == int(found):
        classes = int(found)
    model = _untrained(net, classes)
    own = model.state_dict()
    misshapen = [key for key in own if key in state and state[key].shape != own[key].shape]
    # torchvision's frozen norms do not count their batches.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    lists = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    if found := [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in lists.items() if keys]:
        raise InputError(f"{place}: expected the weights of {net} in {file}, but there are {', '.join(found)}")
    model.load_state_dict(state, strict=False)
    return model


def _untrained(net: str, classes: int) -> nn.Module:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": classes}
    if net in list_models(module=segmentation) and not net.startswith("lraspp"):
        options["aux_loss"] = True  # as in all trained ones
    return get_model(net, **options)


def _read(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise InputError(f"teacher.weights: expected a file, got {str(file)!r}, which is not one")
    if file.suffix not in (".safetensors", ".pth"):
        raise InputError(f"teacher.weights: expected a .safetensors or .pth file, got {file.name!r}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except NOT_LOADED as error:
        raise InputError(f"teacher.weights: {file} cannot be read as plain tensors: {_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f"; its keys are {_some(list(state))}" if isinstance(state, Mapping) else ""
        raise InputError(
            f"teacher.weights: expected a state dict (name -> tensor) in {file}, got {type(state).__name__}{keys}; "
            "save the model's state_dict() alone"
        )
    return state


def _some(keys: list[Any], count: int = 6) -> str:
    return ", ".join(map(str, keys[:count])) + (" ..." if len(keys) > count else "")


def _line(error: BaseException, limit: int = 200) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
