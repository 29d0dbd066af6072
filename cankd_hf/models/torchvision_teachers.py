"""torchvision's detectors and segmentation nets as teachers: their own weights, read at the backbone's outputs."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import detection, get_model, get_model_weights, list_models, segmentation

from cankd_hf.errors import InputError

PREFIX = "torchvision/"
MULTIPLE = 32  # torchvision's detectors pad the images of a batch to it, at the right and bottom
# The same parts under torchvision's names and under ours (`FPNForObjectDetection`), for `student.inherit`.
_OURS = {
    "backbone.fpn.": "neck.pyramid.",
    "head.": "head.head.",
    "rpn.": "head.rpn.",
    "roi_heads.": "head.roi_heads.",
}


class TorchvisionNet(nn.Module):
    """All modules of a torchvision net under its own names, run as far as its maps: nothing resizes the images.

    A detector's maps are those of its `backbone`, which is backbone and pyramid, fine to coarse; its
    `GeneralizedRCNNTransform` (a resize to 800 pixels and a normalisation) is left out. A segmentation net's map is
    the last of its backbone.

    Args:
        model: a net of `torchvision.models.detection` or `.segmentation`.

    Attributes:
        taps: where its maps are, in the syntax of `Taps`.
        image_mean: of red, green, blue, for pixels in 0..1.
        image_std: likewise.
    """

    backbone: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        transform = getattr(model, "transform", None)
        self.pads = transform is not None
        self.taps = ["backbone" if self.pads else "backbone:out"]
        # The segmentation nets are trained with ImageNet's statistics, and hold none.
        self.image_mean = tuple(transform.image_mean) if transform is not None else (0.485, 0.456, 0.406)
        self.image_std = tuple(transform.image_std) if transform is not None else (0.229, 0.224, 0.225)
        for name, module in model.named_children():
            if name != "transform":
                self.add_module(name, module)

    def map_frame(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the images, and of what the maps cover."""
        multiple = MULTIPLE if self.pads else 1
        return size, (size[0] + -size[0] % multiple, size[1] + -size[1] % multiple)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Images `[B, 3, H, W]`, normalised -> maps `[B, C, h, w]` by torchvision's names."""
        height, width = pixel_values.shape[-2:]
        _, covered = self.map_frame((height, width))
        return self.backbone(F.pad(pixel_values, (0, covered[1] - width, 0, covered[0] - height)))

    def state_as_ours(self) -> dict[str, Tensor]:
        """Its tensors under the names that `FPNForObjectDetection` has for the same parts."""
        return {_our_name(name): value for name, value in self.state_dict().items()}


def load_torchvision(name: str, weights: str | None = None, revision: str | None = None) -> tuple[TorchvisionNet, str]:
    """A net of torchvision with trained weights, strictly.

    Args:
        name: `torchvision/NAME`, such as `torchvision/retinanet_resnet50_fpn_v2`.
        weights: a `.safetensors` or `.pth` file (a plain state dict, read without unpickling code) of the same
            architecture, for any number of classes; its norms have the epsilon of a net that torchvision builds
            untrained. None takes torchvision's own, downloaded once into torch's cache.
        revision: which of torchvision's own (`COCO_V1`); None: its default.

    Returns:
        The net, and what its weights are called.

    Raises:
        InputError: for an unknown name, weights that cannot be had, and weights that do not fit (keys are listed).
    """
    place = f"teacher {name}"
    net = name.removeprefix(PREFIX)
    known = list_models(module=detection) + list_models(module=segmentation)
    if net not in known:
        near = difflib.get_close_matches(net, known, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"{place}: torchvision has no such detector or segmentation net; {hint}")
    if weights is not None:
        return TorchvisionNet(_from_file(place, net, Path(weights))), Path(weights).name
    choices = get_model_weights(net)
    if revision is not None and revision not in choices.__members__:
        raise InputError(
            f"teacher.revision: expected one of {', '.join(entry.name for entry in choices)}, got {revision!r}"
        )
    chosen = choices.DEFAULT if revision is None else choices[revision]
    try:
        # Downloaded and read without unpickling code; torchvision then reads that very file once more, because its
        # builder knows which norms and which epsilon these weights were trained with.
        chosen.get_state_dict(weights_only=True, check_hash=True, map_location="cpu")
        model = get_model(net, weights=chosen)
    except (OSError, pickle.UnpicklingError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
        raise InputError(
            f"{place}: its weights cannot be had ({_line(error)}); allow the download, or put {chosen.url} at {file}"
        ) from error
    except RuntimeError as error:
        raise InputError(f"{place}: torchvision's weights do not fit: {_line(error, 600)}") from error
    return TorchvisionNet(model), chosen.name


def _from_file(place: str, net: str, file: Path) -> nn.Module:
    """The net with the weights of a file and the number of classes they are for."""
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
    if any(lists.values()):
        told = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in lists.items() if keys]
        raise InputError(f"{place}: expected the weights of {net} in {file}, but there are {', '.join(told)}")
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
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"teacher.weights: {file} cannot be read as plain tensors: {_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f"; its keys are {_some(list(state))}" if isinstance(state, Mapping) else ""
        raise InputError(
            f"teacher.weights: expected a state dict (name -> tensor) in {file}, got {type(state).__name__}{keys}; "
            "save the model's state_dict() alone"
        )
    return state


def _our_name(name: str) -> str:
    for theirs, ours in _OURS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _some(keys: list[Any], count: int = 6) -> str:
    return ", ".join(map(str, keys[:count])) + (" ..." if len(keys) > count else "")


def _line(error: BaseException, limit: int = 200) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
