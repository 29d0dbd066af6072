"""Run in a process of its own: students load, detect and go through a pipeline where cankd_hf does not exist."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["cankd_hf"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers as tr  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

PICTURE = Image.effect_noise((120, 80), 90).convert("RGB")
CLASSES = ["red", "green", "blue"]


def closed(folder: Path, expected: dict[str, torch.Tensor]) -> tuple[float, int]:
    """A detector of fixed classes: largest difference of its outputs, and how much its pipeline found."""
    model = tr.AutoModelForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(pixel_values=expected["pixel_values"])
    processor = tr.AutoImageProcessor.from_pretrained(folder)
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(80, 120)])
    assert found["labels"].max() <= 2 and found["boxes"].shape[1] == 4
    # Loading once is enough for most: a pipeline takes what the auto classes gave.
    source = {"model": str(folder)} if folder.name == "rt_detr" else {"model": model, "image_processor": processor}
    shown = tr.pipeline("object-detection", **source)(PICTURE, threshold=0.0)
    assert {one["label"] for one in shown} <= set(CLASSES)
    return largest(outputs, expected), len(shown)


def prompted(folder: Path, expected: dict[str, torch.Tensor]) -> tuple[float, int]:
    """The same for one that reads a text, with its own processor."""
    model = tr.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    processor = tr.AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, tr.GroundingDinoProcessor)
    text = processor(images=PICTURE, text=CLASSES, return_tensors="pt")
    assert torch.equal(text["input_ids"], expected["input_ids"])
    with torch.no_grad():
        outputs = model(**{**text, "pixel_values": expected["pixel_values"], "pixel_mask": None})
        seen = model(**text)
    (found,) = processor.post_process_grounded_object_detection(
        seen, threshold=0.0, text_threshold=0.0, target_sizes=[(80, 120)]
    )
    assert len(found["boxes"]) == 12
    shown = tr.pipeline("zero-shot-object-detection", str(folder))(PICTURE, candidate_labels=CLASSES, threshold=0.0)
    assert {one["label"] for one in shown} <= set(CLASSES)
    return largest(outputs, expected), len(shown)


def largest(outputs: tr.utils.ModelOutput, expected: dict[str, torch.Tensor]) -> float:
    """Difference of logits and boxes; tokens that are not there are -inf in both."""
    differences = [
        (outputs[name].nan_to_num(neginf=0.0) - expected[name].nan_to_num(neginf=0.0)).abs().max().item()
        for name in ("logits", "pred_boxes")
    ]
    return max(differences)


if __name__ == "__main__":
    results = {}
    for folder in map(Path, sys.argv[1:]):
        try:
            expected = load_file(folder / "expected.safetensors")
            results[folder.name] = (prompted if "input_ids" in expected else closed)(folder, expected)
        except Exception as error:  # told for each family, not only for the first
            results[folder.name] = repr(error)
    print(json.dumps(results))
