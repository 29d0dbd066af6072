"""Hooks: syntax, gradient checkpointing, copies, compile, and messages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.features import Taps

SEGFORMER = {
    **{"hidden_sizes": [8, 16, 24, 32], "depths": [2, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    **{"decoder_hidden_size": 16, "drop_path_rate": 0.0},
}


class Toy(nn.Module):
    """Two stages and a head that returns nothing like a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)])
        self.split = nn.Identity()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        self.split({"maps": [x, x[..., ::2, ::2]], "mask": x[:, 0] > 0})
        return self.head(x.mean((2, 3)))


def segformer() -> tr.PreTrainedModel:
    return tr.SegformerForSemanticSegmentation(tr.SegformerConfig(**SEGFORMER))


@pytest.mark.parametrize(
    ("taps", "names"),
    [
        (["stages.*"], ["stages.0", "stages.1"]),
        (["stages.-1"], ["stages.1"]),
        (["split:maps"], ["split:maps.0", "split:maps.1"]),
        (["split"], ["split:0", "split:1"]),
        (["split:maps.-1"], ["split:maps.-1"]),
        (["split:1", "stages.0"], ["stages.0", "split:1"]),
    ],
)
def test_syntax(taps: list[str], names: list[str]) -> None:
    model = Toy()
    levels = Taps(model, taps).levels((32, 48))
    assert [level.tap for level in levels] == names
    again = Taps(model, names).levels((32, 48))
    assert again == levels, "the name of a level is a tap"


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["stage.0"], "did you mean stages.0"),
        (["stages.7"], "there is no '7' in stages, only 0, 1"),
        ([], "empty list"),
        (["split:nothing"], "only maps, mask"),
        (["split:maps.4"], "map 4 of an output of 2 maps"),
        (["head"], "feature maps"),
    ],
)
def test_messages(taps: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Taps(Toy(), taps).levels((32, 48))


def test_search_needs_maps() -> None:
    with pytest.raises(InputError, match=r"found none; fix: name the modules, such as taps: \[0, 1\]"):
        Taps(nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 2)))


def test_maps_are_of_the_last_forward_and_given_once() -> None:
    model = Toy()
    taps = Taps(model, ["stages.0"])
    first, second = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    model(first)
    model(second)
    assert torch.equal(taps.collect((32, 32))[0], model.stages[0](second))
    with pytest.raises(RuntimeError, match="did not run"):
        taps.collect((32, 32))
    model(first)
    taps.remove()
    model.stages[0](second)
    assert not taps._outputs


def test_a_copy_has_its_own_taps() -> None:
    model = nn.ModuleDict({"student": Toy()})
    taps = Taps(model["student"], ["stages.0"])
    other, their_taps = copy.deepcopy((model, taps))
    other["student"](torch.randn(1, 3, 32, 32))
    assert not taps._outputs
    assert len(their_taps.collect((32, 32))) == 1


class Student(nn.Module):
    """What the distiller does with taps, and no more."""

    def __init__(self, model: nn.Module, taps: Any = "auto") -> None:
        super().__init__()
        self.model = model
        self.taps = Taps(model, taps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits = self.model(pixel_values).logits
        maps = self.taps.collect((pixel_values.shape[-2], pixel_values.shape[-1]))
        return logits.square().mean() + sum((m.square().mean() for m in maps), torch.zeros(()))


def gradients(student: Student, pixels: Tensor) -> list[Tensor]:
    student.zero_grad()
    student(pixels).backward()
    return [p.grad.clone() for p in student.parameters() if p.grad is not None]


def checkpoint_layers(model: Any, **kwargs: Any) -> None:
    """Turns it on, under its name in transformers 5.19 and 5.20 too."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(kwargs)


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_nothing() -> None:
    student = Student(segformer(), ["segformer.stages.*", "decode_head.linear_projections.*"]).train()
    student.model.decode_head.dropout.p = 0.0
    pixels = torch.randn(2, 3, 64, 64)
    plain = gradients(student, pixels)
    checkpoint_layers(student.model, use_reentrant=False)
    checkpointed = gradients(student, pixels)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed, strict=True))
    assert not student.taps._outputs, "the second forward must not be taken for a new one"


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_gradient() -> None:
    inside = next(name for name, _ in segformer().named_modules() if name.endswith("mlp.fc2"))
    student = Student(segformer(), [inside]).train()
    checkpoint_layers(student.model, use_reentrant=True)
    with pytest.raises(InputError, match="use_reentrant: false"):
        student(torch.randn(1, 3, 64, 64, requires_grad=True))


@pytest.mark.slow
def test_compiled_student() -> None:
    student = Student(segformer()).eval()
    pixels = torch.randn(1, 3, 64, 64)
    plain = gradients(student, pixels)
    student.zero_grad()
    torch.compile(student)(pixels).backward()
    found = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, found, strict=True))
