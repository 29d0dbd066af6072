"""Memory and time of each way of having two large teachers; a command for a GPU, no test.

    python -m tests.training.teachers_cost [--tiny]

A ResNet-18 learns without labels (`instance_mse` of each teacher) from random weights of the size of DINOv2 ViT-B/14
and ViT-L/14: 224 pixels, batches of 32, bfloat16, through the trainer. Peak is `torch.cuda.max_memory_allocated` over
the timed steps, at rest what is allocated after the last of them; the time of a step is that of 12 steps together, the
device synchronised before and after them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Dinov2Config, Dinov2Model, ResNetBackbone, ResNetConfig, TrainerCallback

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm, load_teacher
from cankd_hf.config.teacher import CacheConfig

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Images(Dataset[dict[str, Tensor]]):
    """Random images [3, size, size]."""

    def __init__(self, count: int, size: int) -> None:
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index]}


class Meter(TrainerCallback):
    """Seconds and peak bytes of the steps after the first `warm` ones."""

    def __init__(self, warm: int, last: int) -> None:
        self.warm, self.last, self.start, self.seconds, self.peak = warm, last, 0.0, 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in (self.warm, self.last):
            return
        if ON_GPU:
            torch.cuda.synchronize()
        if state.global_step == self.warm:
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self.start
            self.peak = torch.cuda.max_memory_allocated() if ON_GPU else 0


def vit(width: int, layers: int, heads: int, tiny: bool) -> Dinov2Model:
    shape = (width // 24, 2, 2) if tiny else (width, layers, heads)
    settings = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), shape, strict=True))
    with torch.device(DEVICE):  # drawing the weights of a large one is slow elsewhere
        model = Dinov2Model(Dinov2Config(**settings, patch_size=14, image_size=518))
    return model.cpu().eval()


def row(mode: str, models: dict[str, Any], tiny: bool, warm: int = 3, steps: int = 12) -> str:
    """One line of the table. `models`: name -> model and the settings of its teacher."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    torch.manual_seed(1)
    sizes = [16, 32, 48, 64] if tiny else [64, 128, 256, 512]
    shape = {"embedding_size": sizes[0], "hidden_sizes": sizes, "depths": [2, 2, 2, 2], "layer_type": "basic"}
    meter = Meter(warm, warm + steps)
    trainer = CanKDTrainer(
        ResNetBackbone(ResNetConfig(**shape, out_indices=[3, 4])),
        teachers={name: load_teacher(copy.deepcopy(model), **given) for name, (model, given) in models.items()},
        args=CanKDConfig(
            tempfile.mkdtemp(),
            max_steps=warm + steps,
            per_device_train_batch_size=4 if tiny else 32,
            bf16=ON_GPU,
            use_cpu=not ON_GPU,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
        ),
        terms=[LossTerm(loss="instance_mse", teacher=name, weight=1.0, name=name) for name in models],
        task_weight=0.0,
        train_dataset=Images(128, 56 if tiny else 224),
        callbacks=[meter],
    )
    trainer.train()
    rest = torch.cuda.memory_allocated() if ON_GPU else 0
    return f"| {mode} | {meter.peak / 2**20:,.0f} | {rest / 2**20:,.0f} | {1000 * meter.seconds / steps:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models and images, to see that it runs")
    tiny = parser.parse_args().tiny
    base, large = vit(768, 12, 12, tiny), vit(1024, 24, 16, tiny)

    def both(**given: Any) -> dict[str, Any]:
        return {"base": (base, given), "large": (large, given)}

    stored = {"cache": CacheConfig(views=1, folder=tempfile.mkdtemp())}
    row("warm-up", {"base": (base, {})}, tiny, 1, 2)
    print("| mode | peak MiB | at rest MiB | ms a step |\n|---|---|---|---|")
    print(row("ViT-B alone", {"base": (base, {})}, tiny))
    print(row("ViT-L alone", {"large": (large, {})}, tiny))
    print(row("both live", both(), tiny))
    print(row("both, `offload: true`", both(offload=True), tiny))
    print(row("both, ViT-L `offload: true`", {"base": (base, {}), "large": (large, {"offload": True})}, tiny))
    print(row("both, ViT-L `every: 2`", {"base": (base, {}), "large": (large, {"every": 2})}, tiny))
    print(row("both, ViT-B `device: cpu`", {"base": (base, {"device": "cpu"}), "large": (large, {})}, tiny, 1, 3))
    print(row("both, `cache: {views: 1}`, the run that fills it", both(**stored), tiny, 1, 3))
    print(row("both, `cache: {views: 1}`, a run that reads it", both(**stored), tiny))


if __name__ == "__main__":
    main()
