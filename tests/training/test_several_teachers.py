"""Several teachers: one in a dictionary is one alone, and where their weights are changes no number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import set_seed

from cankd_hf import TeacherOutput, load_teacher
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.teachers.source import asked
from cankd_hf.teachers.teacher import Teacher

from .tiny_trainers import dinov2, largest_difference, student, teacher, terms, trainer, weights


def placed(seed: int = 1, **config: Any) -> Teacher:
    set_seed(seed)
    return load_teacher(TeacherConfig(config=dinov2(), **config))


def trained(folder: Path, given: Any, **settings: Any) -> dict[str, Tensor]:
    made = trainer(folder, **given, **settings)
    made.train()
    return weights(made)


def test_one_teacher_in_a_dictionary_equals_one_alone(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", {"teacher": teacher()})
    named = trained(
        tmp_path / "named", {"teacher": None, "teachers": {"dino": teacher()}}, terms=terms(teacher="dino")
    )
    assert largest_difference(alone, named) == 0.0


@pytest.mark.parametrize("config", [{"offload": True}, {"device": "cpu"}])
def test_where_the_weights_of_a_teacher_are_changes_no_number(config: dict[str, Any], tmp_path: Path) -> None:
    usual = trained(tmp_path / "usual", {"teacher": placed()})
    assert largest_difference(usual, trained(tmp_path / "moved", {"teacher": placed(**config)})) == 0.0


def test_an_offloaded_teacher_is_on_the_device_only_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of its weights is there, and dropped; those in main memory stay as they are, even if it fails."""
    made, places = placed(offload=True), []
    before = {name: tensor.data_ptr() for name, tensor in made.state_dict().items()}

    def forward(self: Teacher, images: Tensor) -> TeacherOutput:
        places.append({tensor.device.type for tensor in (*self.parameters(), *self.buffers())})
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(made), "forward", forward)
    with pytest.raises(RuntimeError, match="out of memory"):
        asked(made, torch.zeros(1, 3, 28, 28, device="meta"))
    assert places == [{"meta"}]
    assert {name: tensor.data_ptr() for name, tensor in made.state_dict().items()} == before
    assert {tensor.device.type for tensor in (*made.parameters(), *made.buffers())} == {"cpu"}


def test_each_of_several_teachers_has_its_projection_where_channels_agree_too(tmp_path: Path) -> None:
    """Otherwise one map would be drawn to two that differ, and end between them."""
    alone = trainer(tmp_path / "alone", model=student(fpn_channels=32)).distiller.connectors
    both = trainer(
        tmp_path / "both",
        model=student(fpn_channels=32),
        teacher=None,
        teachers={"a": teacher(1), "b": teacher(2)},
        terms=[*terms(teacher="a", name="a"), *terms(teacher="b", name="b")],
    ).distiller.connectors
    assert {type(one.projection) for one in alone.values()} == {nn.Identity}
    assert {type(one.projection) for one in both.values()} == {nn.Conv2d} and len(both) == 2 * len(alone)


def test_outputs_are_moved_whole() -> None:
    values = {"class_logits": torch.zeros(1, 4, 3), "boxes": torch.zeros(1, 4, 4)}
    output = TeacherOutput([torch.zeros(1, 2, 3, 3)] * 2, torch.zeros(1, 3, 3, 3), values, values)
    assert output.to(torch.device("cpu")) is output
    moved = output.to(torch.device("meta"))
    found = [*moved.maps, moved.logits, *moved.dense.values(), *moved.queries.values()]  # type: ignore[union-attr]
    assert len(found) == 7 and all(one is not None and one.is_meta for one in found)
    only = TeacherOutput([], torch.zeros(1, 3)).to(torch.device("meta"))
    assert only.logits is not None and only.logits.is_meta


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"device": "gpu"}, "expected cpu or an accelerator such as cuda:1, got 'gpu'"),
        ({"device": "cpu", "offload": True}, "leave one of the two out"),
    ],
)
def test_bad_places_are_told(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        placed(**config)


def test_a_device_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="teacher.device: expected a device of this machine, got xpu"):
        trainer(tmp_path, teacher=placed(device="xpu")).train()
    made = trainer(tmp_path, teacher=placed(offload=True))
    through_its_head = SimpleNamespace(term=SimpleNamespace(loss="cross_head"), teacher="teacher")
    monkeypatch.setattr(type(made.distiller), "placed", [through_its_head])
    with pytest.raises(InputError, match="teacher.offload: expected none with `cross_head`"):
        made.place_teacher("teacher")
