"""Channels-last weights and loading processes that stay: files and resumed runs are as with neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cankd_hf.training.layout import channels_last

from .beside_stock import images, ours, weights
from .tiny_trainers import largest_difference, teacher, terms

LAST = torch.channels_last


def test_layers_that_torch_cannot_compute_on_a_cpu_keep_the_usual_layout() -> None:
    """torch 2.14 writes beyond its memory in the backward pass of the second convolution."""
    narrow = nn.Conv2d(8, 32, 1, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), narrow, nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1, stride=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    channels_last(channels_last(model, torch.device("cpu")), torch.device("cpu"))
    assert len(narrow._forward_pre_hooks) == 1, "once is enough"
    assert narrow.weight.stride() == (8, 1, 1, 1) and model[3].weight.stride() == (32, 1, 32, 32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen: list[torch.Tensor] = []
    narrow.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    images = torch.randn(2, 3, 112, 112).contiguous(memory_format=LAST)
    for _ in range(3):
        model(images).sum().backward()
    assert all(one.is_contiguous() and not one.is_contiguous(memory_format=LAST) for one in seen)
    on_gpu = channels_last(nn.Conv2d(8, 32, 1, stride=2), torch.device("cuda"))
    assert not on_gpu._forward_pre_hooks


@pytest.mark.slow
def test_a_run_resumes_bit_by_bit_in_this_layout_with_workers_that_stay(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "channels_last": True,
        "bf16": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def run(**changed: Any) -> Any:
        given = {**settings, **changed}
        return ours(tmp_path, train_dataset=images(4), teacher=teacher(), terms=terms(), **given)

    whole = run()
    whole.train()
    saved = load_file(tmp_path / "checkpoint-4/model.safetensors")
    assert all(value.is_contiguous() for value in saved.values())
    assert all(torch.equal(saved[name], value) for name, value in weights(whole).items() if name in saved)
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name
    again = run(dataloader_persistent_workers=False, save_strategy="no")
    again.train()
    assert largest_difference(weights(again), weights(whole)) == 0, "workers that stay read the same images"
