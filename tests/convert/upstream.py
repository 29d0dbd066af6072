"""Runs a model of MMDetection's own, random weights and all, and saves what it was given and what it gave.

    python tests/convert/upstream.py CONFIG OUT.pt [KEY=VALUE ...]

For an environment of its own with mmdet 3.3, mmengine, mmcv-lite and torch (`CANKD_UPSTREAM` names its Python for
`test_upstream.py`). It imports nothing of cankd_hf. mmcv's compiled operators are replaced: suppression, RoI align and
deformable convolution by torchvision's; deformable attention by mmcv's own version in plain PyTorch.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import mmcv
import torch
import torchvision
from torch import nn

SIZES = [(160, 250), (200, 180)]


class Stub(types.ModuleType):
    """A module in which every name is a class that nothing here builds."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (nn.Module,), {}))
        return self.__dict__[name]


def suppressed_by_class(boxes: Any, scores: Any, classes: Any, settings: Any, class_agnostic: bool = False) -> Any:
    classes = torch.zeros_like(classes) if class_agnostic else classes
    keep = torchvision.ops.batched_nms(boxes, scores, classes, settings.get("iou_threshold", 0.5))
    keep = keep[: settings.get("max_num", len(keep))]
    return torch.cat([boxes[keep], scores[keep, None]], 1), keep


class Align(nn.Module):
    def __init__(self, output_size: Any, spatial_scale: float = 1.0, sampling_ratio: int = 0, **_: Any) -> None:
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else output_size
        self.spatial_scale, self.sampling_ratio = spatial_scale, sampling_ratio

    def forward(self, x: Any, rois: Any) -> Any:
        settings = (self.output_size, self.spatial_scale, self.sampling_ratio, True)
        return torchvision.ops.roi_align(x, rois, *settings)


def replace_operators() -> None:
    mmcv.__version__ = "2.1.0"  # mmdet 3.3 asks for less than 2.2
    operators = Stub("mmcv.ops")
    operators.__path__ = []
    sys.modules["mmcv.ops"] = mmcv.ops = operators
    parts = ("nms", "roi_align", "carafe", "merge_cells", "deform_conv", "modulated_deform_conv", "point_sample")
    for part in (*parts, "focal_loss", "roi_pool", "corner_pool", "multi_scale_deform_attn"):
        sys.modules[f"mmcv.ops.{part}"] = Stub(f"mmcv.ops.{part}")
        setattr(operators, part, sys.modules[f"mmcv.ops.{part}"])
    operators.batched_nms, operators.RoIAlign = suppressed_by_class, Align
    sys.modules["mmcv.ops.nms"].batched_nms = suppressed_by_class
    import mmcv.utils.ext_loader as loader

    loader.load_ext = lambda *_: types.SimpleNamespace()
    name = "mmcv.ops.multi_scale_deform_attn"
    spec = importlib.util.spec_from_file_location(name, f"{mmcv.__path__[0]}/ops/multi_scale_deform_attn.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    operators.MultiScaleDeformableAttention = module.MultiScaleDeformableAttention
    import mmcv.cnn.bricks.transformer as bricks

    bricks.MultiScaleDeformableAttention = module.MultiScaleDeformableAttention


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep the size of maps and spread the outputs of the heads."""
    generator = torch.Generator().manual_seed(0)
    wide = {"sampling_offsets.bias": 2.0, "reg_branches": 0.6}
    buffers = [(name, x) for name, x in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    for name, x in [*model.named_parameters(), *buffers]:
        value = torch.randn(x.shape, generator=generator)
        factor = next((factor for part, factor in wide.items() if part in name), 1.0)
        if x.ndim > 1:
            x.copy_(value * factor * 1.2 / x[0].numel() ** 0.5)
        elif name.endswith("running_var"):
            x.copy_(1 + 0.1 * value.abs())
        elif name.endswith(("weight", "scale")):
            x.copy_(1 + 0.1 * value)
        else:
            x.copy_((1 if "offsets" in name else 0.1) * factor * value)


def spread(model: nn.Module) -> None:
    """Scales the last layers of two-stage heads, once each in the next forward pass, to outputs of a usual spread."""
    wanted = {"rpn_cls": 1.5, "rpn_reg": 0.3, "fc_cls": 1.5, "fc_reg": 1.0, "conv_logits": 1.5}

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if module not in handles:
            return None
        handles.pop(module).remove()
        with torch.no_grad():
            module.weight *= wanted[names[module]] / float((output - output.mean()).std())
        return module(*inputs)

    names = {module: name.split(".")[-1] for name, module in model.named_modules() if name.split(".")[-1] in wanted}
    handles = {module: module.register_forward_hook(hook) for module in names}


def main(config: str, out: str, *changes: str) -> None:
    replace_operators()
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(True)
    settings = Config.fromfile(f"{Path(mmdet.__file__).parent}/.mim/configs/{config}")
    pairs = (change.split("=", 1) for change in ("model.backbone.init_cfg=None", *changes))
    settings.merge_from_dict({key: ast.literal_eval(value) for key, value in pairs})
    model = MODELS.build(settings.model).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(5)
    images, samples = [], []
    for height, width in SIZES:
        image = (torch.rand(3, height, width, generator=generator) * 255).byte()
        image[:, 20 : height // 2, 30 : width // 2] //= 3
        images.append(image)
        samples.append(DetDataSample())
        shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (height, width))
        samples[-1].set_metainfo({**shapes, "scale_factor": (1.0, 1.0)})
    given = model.data_preprocessor({"inputs": images, "data_samples": samples}, False)
    seen: dict[str, Any] = {}
    with torch.no_grad():
        if hasattr(model, "encoder"):
            model.encoder.register_forward_hook(lambda *call: seen.update(memory=call[-1]))
            states = model.forward_transformer(model.extract_feat(given["inputs"]), given["data_samples"])
            logits, boxes = model.bbox_head(**states)
            seen.update(logits=logits[-1], boxes=torch.as_tensor(boxes))
        else:
            seen["maps"] = list(model.extract_feat(given["inputs"]))
            spread(model)
            model.predict(given["inputs"], given["data_samples"], rescale=False)
            for name, module in model.named_modules():
                if name.endswith("conv_logits"):
                    module.register_forward_hook(lambda *call, name=name: seen.__setitem__(name, call[-1]))
            found = model.predict(given["inputs"], given["data_samples"], rescale=False)
            seen["found"] = [dict(one.pred_instances.items()) for one in found]
    meta = {"cfg": settings.pretty_text}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, f"{out}.pth")
    torch.save({"images": images, "inputs": given["inputs"], **seen}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
