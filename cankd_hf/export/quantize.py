"""int8: static quantization of a float32 ONNX file with ranges measured on images of the data set."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.export.files import one_line

# Operators with weights, and those between them that pass 8 bits on instead of converting to float32 and back.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CARRYING = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Resize")
# What chooses among detections: boxes and scores computed after it are exact numbers, not features.
CHOOSING = ("NonMaxSuppression", "TopK")


class Reader:
    """Gives ONNX Runtime one image at a time (its `CalibrationDataReader`), and counts them."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images, self.count = iter(images), 0

    def get_next(self) -> dict[str, Any] | None:
        """The next input, None after the last."""
        image = next(self.images, None)
        self.count += image is not None
        return None if image is None else {"pixel_values": image.numpy()}


def write_int8(exact: Path, images: Iterable[Tensor], file: Path, facts: dict[str, str]) -> int:
    """Quantizes a float32 file, whose batch and size stay dynamic. Returns the number of images it was calibrated on.

    Weights are int8 with a scale for each channel, activations uint8 with one for each tensor (QDQ format). Only the
    smallest and the largest value of each tensor are kept of the images, so memory does not grow with their number.

    Args:
        exact: the float32 file.
        images: [B, 3, H, W] each.
        file: to write.
        facts: metadata.

    Raises:
        InputError: if nothing can be quantized, or ONNX Runtime fails.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    reader = Reader(images)
    large = any(part != exact for part in exact.parent.glob(f"{exact.name}*"))  # weights beyond 2 GB
    try:
        with TemporaryDirectory(dir=file.parent) as folder, _quiet():
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(exact, prepared, skip_symbolic_shape=True, save_as_external_data=large)
            left = excluded(onnx.load(prepared, load_external_data=False).graph)
            quantize_static(
                prepared,
                file,
                reader,
                QuantFormat.QDQ,
                op_types_to_quantize=[*WEIGHTED, *CARRYING],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=left,
                use_external_data_format=large,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"MatMulConstBOnly": True},
            )
        made = onnx.load(file, load_external_data=False)
        del made.metadata_props[:], made.graph.value_info[:]  # shapes that sessions infer again
        used = [opset for opset in made.opset_import if opset.domain in {node.domain for node in made.graph.node}]
        del made.opset_import[:]  # all that ONNX Runtime knows: other runtimes refuse sets they do not
        made.opset_import.extend(used)
        onnx.helper.set_model_props(made, facts)
        file.write_bytes(made.SerializeToString())
    except InputError:
        raise
    except Exception as error:  # whatever ONNX Runtime raises
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk, not of the model
        raise InputError(f"int8: ONNX Runtime cannot quantize this model ({one_line(error)}); use float16") from error
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise InputError("int8: this model has no convolution or matrix product to quantize; use float16")
    return reader.count


def excluded(graph: Any) -> list[str]:
    """Names of the nodes that stay in float32: what comes after the last layer with weights, and what selects.

    Anchors, decoded boxes and scores are made of the same additions and concatenations as features, but 256 steps are
    too few for them.
    """
    users: dict[str, list[Any]] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weighted = [node for node in graph.node if node.op_type in WEIGHTED]
    before = _reached(weighted, lambda node: [makers[name] for name in node.input if name in makers])
    chosen = _reached(
        [node for node in graph.node if node.op_type in CHOOSING],
        lambda node: [user for name in node.output for user in users.get(name, [])],
    )
    return [
        node.name
        for node in graph.node
        if node.op_type not in WEIGHTED and (node.name in chosen or node.name not in before)
    ]


def _reached(starts: list[Any], step: Any) -> set[str]:
    """Names of the nodes that steps lead to."""
    found: set[str] = set()
    left = list(starts)
    while left:
        for node in step(left.pop()):
            if node.name not in found:
                found.add(node.name)
                left.append(node)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tools print and log."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
