"""Training with unlabelled images: who learns what from whom, and what changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.batch import TEACHER_VIEW, Batch
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.streams import StreamDataset, stream_of
from cankd_hf.data.common.strong import strongly
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.common.unlabelled_stream import with_unlabelled
from cankd_hf.data.features.load import load_images
from cankd_hf.data.generated import ShapesSource
from cankd_hf.data.segmentation.transforms import TrainTransform
from cankd_hf.errors import InputError
from cankd_hf.models.students import build_student
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import FeaturesTask
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import TeacherOutput
from cankd_hf.training.class_shares import ClassShares
from cankd_hf.training.connecting import seen_cells
from cankd_hf.training.objective import Objective

from .test_commands import RESNET, recipe
from .tiny_trainers import Images, largest_difference, of_shapes, student, teacher, terms, trainer, weights


class Bare(Dataset):
    """Images without a mask."""

    def __init__(self, count: int) -> None:
        self.images = Images(count + 20, noisy=True)

    def __len__(self) -> int:
        return len(self.images) - 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[20 + index]["pixel_values"]}


def both(labelled: int = 12, unlabelled: int = 7, ratio: float = 1.0) -> WithUnlabelled:
    return WithUnlabelled(Images(labelled, noisy=True), Bare(unlabelled), ratio)


def normed(seed: int = 0) -> Any:
    """A student with BatchNorm, which would remember any image that passes through it."""
    return student(seed, norm="batch", dropout=0.1)


def test_a_student_alone_trains_exactly_as_without_them(tmp_path: Path) -> None:
    """Bit for bit, BatchNorm included: without a teacher, and where no term counts."""

    def trained(data: Any, **settings: Any) -> dict[str, torch.Tensor]:
        made = trainer(tmp_path, data, model=normed(), max_steps=3, per_device_train_batch_size=4, **settings)
        made.train()
        return {name: value for name, value in weights(made).items() if name.startswith("student.")}

    alone = trained(Images(12, noisy=True), teacher=None, terms=())
    for settings in ({"teacher": None, "terms": ()}, {"terms": terms(weight=0.0)}, {"terms": ()}):
        assert all(torch.equal(value, alone[name]) for name, value in trained(both(), **settings).items())
    assert largest_difference(alone, trained(both())) > 0


def test_labelled_images_have_the_task_and_all_have_the_teacher(tmp_path: Path) -> None:
    made = trainer(tmp_path, both(), per_device_train_batch_size=4)
    made.train_dataset.set_epoch(0)
    batch = next(iter(made.get_train_dataloader()))
    assert batch.meta["labelled"].tolist() == [True, True, False, False]
    assert (batch["labels"][2:] == 255).all() and (batch["labels"][:2] != 255).all()
    outputs = made.source(batch)
    assert len(outputs["teacher"].maps[0]) == 4
    with torch.no_grad():
        whole = made.distiller(**batch.inputs, teachers=outputs).parts
        labelled = made.distiller(pixel_values=batch["pixel_values"][:2], labels=batch["labels"][:2]).parts
    assert torch.allclose(whole["task"], labelled["task"])  # the others neither count nor thin it out


def test_a_resumed_run_sees_the_same_images(tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> Any:
        settings = {"max_steps": 5, "per_device_train_batch_size": 4, "seed": 5, **settings}
        return trainer(tmp_path / folder, both(), model=normed(), **settings)

    whole = run("whole", save_strategy="steps", save_steps=2)
    whole.train()
    for step in (2, 4):  # within the first and the second epoch of 3 steps
        again = run(f"from{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert largest_difference(weights(whole), weights(again)) == 0


def test_batches_are_alike_whatever_loads_them(tmp_path: Path) -> None:
    def batches(workers: int) -> list[Batch]:
        made = of_shapes(tmp_path, dataloader_num_workers=workers, erase=[0.5])
        return list(made.get_train_dataloader())

    for one, other in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("pixel_values", TEACHER_VIEW, "labels"))
        assert all(torch.equal(one.meta[key], other.meta[key]) for key in ("mix", "seen", "sample", "view"))


def test_the_teacher_sees_its_own_pictures_and_the_student_never_does(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    asked: list[torch.Tensor] = []
    model = student(num_labels=6)
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    made = of_shapes(tmp_path, model=model, max_steps=1, cutmix=1.0)
    seen.clear()
    made.teacher.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    batch = next(iter(made.get_train_dataloader()))
    made.train()
    assert all(TEACHER_VIEW not in names and "meta" not in names for names in seen) and seen
    assert torch.equal(asked[0], batch[TEACHER_VIEW]) and not torch.equal(asked[0], batch["pixel_values"])
    assert (batch.meta["mix"][:4, 0] == -1).all() and (batch.meta["mix"][4:, 0] >= 4).all()


@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_erased_cells_and_padding_teach_nothing(channels_last: bool, tmp_path: Path) -> None:
    """A target changed there changes no gradient, and one changed elsewhere does."""
    every = [LossTerm(loss=name, weight=1.0) for name in ("instance_mse", "channel_wise", "pearson")]
    made = of_shapes(tmp_path, terms=every, erase=[1.0], cutmix=1.0, images="all", channels_last=channels_last)
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    outputs = made._ask_teachers(batch, [1.0] * len(every), False)["teachers"]

    def gradient(changed: torch.Tensor | None) -> torch.Tensor:
        teachers = dict(outputs)
        if changed is not None:
            maps = [one + 9.0 * changed[:, None].to(one.dtype) for one in outputs["teacher"].maps]
            teachers["teacher"] = type(outputs["teacher"])(maps)
        made.distiller.zero_grad()
        loss = made.distiller(**batch.inputs, teachers=teachers, meta=batch.meta).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in made.student.parameters() if p.grad is not None])

    seen = batch.meta["seen"]
    assert not seen.all() and seen.any()
    sizes = {tuple(one.shape[-2:]) for one in outputs["teacher"].maps}
    assert len(sizes) == 1
    cells = seen_cells(seen, sizes.pop())
    assert torch.equal(gradient(None), gradient(~cells))
    assert not torch.equal(gradient(None), gradient(cells))


def test_seen_cells_are_wholly_seen() -> None:
    seen = torch.ones(1, 32, 48, dtype=torch.bool)
    seen[0, 17, 40] = False
    assert (~seen_cells(seen, (4, 6)))[0].nonzero().tolist() == [[2, 5]]
    assert (~seen_cells(seen, (2, 3)))[0].nonzero().tolist() == [[1, 2]]
    assert seen_cells(seen, (32, 48)).equal(seen)


def test_what_cannot_be_shared_out_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 or 6"):
        trainer(tmp_path, both(), per_device_train_batch_size=5)
    with pytest.raises(InputError, match="train_sampling_strategy"):
        trainer(tmp_path, both(), per_device_train_batch_size=4, train_sampling_strategy="group_by_length")
    trainer(tmp_path, both(), per_device_train_batch_size=5, teacher=None, terms=())  # shares out nothing


def test_a_mix_needs_two_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.strong\.cutmix"):
        of_shapes(tmp_path, per_device_train_batch_size=2)
    of_shapes(tmp_path, per_device_train_batch_size=2, cutmix=0.0)


def test_rectangles_that_are_coarser_than_asked_for_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = {"cutmix": 0.5, "cutmix_area": [0.02, 0.1], "erase": [0.5], "erase_area": [0.02, 0.4]}
    made = of_shapes(tmp_path, **asked)
    stride, (height, width) = made.data_collator.stride, made.distiller.image_size
    share = stride**2 / (height * width)
    assert 0.1 < share < 0.4 and f"one takes at least {share:.0%}, not 10%, in pictures of {height} x" in caplog.text
    assert "data.strong.cutmix: rectangles are" in caplog.text and "data.strong.erase:" not in caplog.text
    made._tell_coarse(StrongConfig(**asked), 2 * max(height, width))
    assert "data.strong.erase: rectangles are" in caplog.text and caplog.text.count("none fits") == 2


def test_small_students_are_spared(tmp_path: Path) -> None:
    """Below 2 million parameters colours change by half, unless the strength is given."""
    made = of_shapes(tmp_path)
    assert made.train_dataset.dataset.unlabelled.transform.strong.strength == 0.5
    made = of_shapes(tmp_path, strength=1.0)
    assert made.train_dataset.dataset.unlabelled.transform.strong.strength == 1.0


def test_an_objective_without_a_teacher_leaves_them_out_later_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, both(), per_device_train_batch_size=4, teacher=teacher())
    made.set_objective(Objective())
    assert all(batch.meta["labelled"].all() for batch in made.get_train_dataloader())


def answers(counts: list[float], labelled: list[bool]) -> tuple[dict[str, TeacherOutput], dict[str, torch.Tensor]]:
    """Logits [B, 3, 2, 10] whose columns hold the classes in these tenths, and their `meta`."""
    column = torch.repeat_interleave(torch.arange(3), torch.tensor([round(10 * count) for count in counts]))
    logits = torch.nn.functional.one_hot(column, 3).T[None, :, None].expand(len(labelled), 3, 2, 10).float()
    return {"t": TeacherOutput([], logits)}, {"labelled": torch.tensor(labelled)}


def test_classes_that_the_teacher_never_finds_are_named_once() -> None:
    shares = ClassShares(["sky", "road", "sign"], ignore_index=255)
    labels = torch.full((2, 2, 10), 255)
    labels[0, :, :5], labels[0, :, 5:7] = 0, 2
    outputs, meta = answers([0.5, 0.5, 0.0], [True, False])
    meta["valid"] = torch.ones(2, 2, 10, dtype=torch.bool)
    meta["valid"][1, :, 5:] = False  # what it says of padding does not count
    for _ in range(4):
        shares.see(outputs, labels, meta)
    assert shares.vanished() is None  # too few batches to say so
    shares.see(outputs, labels, meta)
    assert shares.shares() == pytest.approx({"sky": 1 / (5 / 7), "sign": 0.0})
    assert "sign 0" in (shares.vanished() or "") and shares.vanished() is None
    shares.see({"t": TeacherOutput([])}, labels, meta)  # a teacher without logits says nothing
    assert shares.batches == 5


def test_a_run_tells_its_images_and_logs_the_rarest_class(tmp_path: Path) -> None:
    frozen = load_teacher(student(1, num_labels=6))
    made = of_shapes(tmp_path, teacher=frozen, terms=[LossTerm(loss="kl", weight=1.0)], max_steps=6)
    told = made.images_told() or ""
    assert "8 labelled and 12 unlabelled images in batches of 4 labelled and 4 unlabelled" in told
    assert "3 and 2 times" in told
    made.train()
    assert any("unlabelled_rarest" in entry for entry in made.state.log_history)
    assert trainer(tmp_path, Images(8)).images_told() is None


def test_a_label_free_run_takes_them_as_further_images(tmp_path: Path) -> None:
    config = DataConfig(
        path="shapes",
        unlabelled="shapes",
        generated={"train": 8, "validation": 2, "test": 2, "unlabelled": 5, "size": 64},
        image_size=[64, 64],
    )
    data = load_images(config)
    assert len(data.train) == 13 and data.unlabelled is None and data.facts["unlabelled"]["images"] == 5
    assert TEACHER_VIEW in data.train[12] and TEACHER_VIEW not in data.train[7]
    task, model = FeaturesTask(), build_student(StudentConfig(backbone=RESNET), None, {})
    made = trainer(tmp_path, data.train, model=model, task=task, task_weight=0, max_steps=2)
    batches = list(made.get_train_dataloader())
    assert sorted(int(i) for batch in batches for i in batch.meta["sample"]) == list(range(13))
    made.train()


def test_user_collators_get_samples_as_they_are(tmp_path: Path) -> None:
    """With images of both kinds too, and nothing of ours in them."""

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        assert all(sample.keys() <= {"pixel_values", "labels"} for sample in samples)
        void = torch.full((64, 64), 255)
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": torch.stack([sample.get("labels", void) for sample in samples]),
        }

    trainer(tmp_path, both(), per_device_train_batch_size=4, data_collator=collate).train()


def test_a_recipe_says_at_once_what_cannot_be_shared_out(tmp_path: Path) -> None:
    def read(**changes: Any) -> Any:
        data = {"path": "shapes", "unlabelled": "shapes", "crop_size": [64, 64], **changes.pop("data", {})}
        return load_recipe(recipe(tmp_path, data=data, **changes))

    with pytest.raises(InputError, match=r"data\.unlabelled_ratio.*4 or 8"):
        read(data={"unlabelled_ratio": 3.0}, training={"max_steps": 1, "per_device_train_batch_size": 6})
    with pytest.raises(InputError, match=r"data\.strong\.cutmix"):
        read(data={"strong": {"cutmix": 0.5}}, training={"max_steps": 1, "per_device_train_batch_size": 2})
    with pytest.raises(InputError, match=r"data\.unlabelled_streaming.*max_steps"):
        read(data={"unlabelled_streaming": True}, training={"per_device_train_batch_size": 4})
    read(data={"unlabelled_ratio": 3.0}, teacher=None, baseline=False)  # alone there is nothing to share out
    assert read(data={"strong": {"images": "none"}}, training={"per_device_train_batch_size": 2}).data.unlabelled


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streams_train_and_resume(workers: int, tmp_path: Path) -> None:
    config = DataConfig(path="shapes", crop_size=[64, 64])
    transform = TrainTransform(config)

    def run(folder: str, **settings: Any) -> Any:
        bare = StreamDataset(stream_of(ShapesSource("unlabelled", 9, 64, masks=False)), strongly(transform, config), 8)
        both = with_unlabelled(ImageDataset(ShapesSource("train", 4, 64), transform), bare, 1.0)
        settings |= {"max_steps": 5, "per_device_train_batch_size": 4, "dataloader_num_workers": workers}
        return trainer(tmp_path / folder, both, model=student(num_labels=6), **settings)

    whole = run("whole", save_strategy="steps", save_steps=3)
    assert "from a stream" in (whole.images_told() or "")
    batches = list(whole.get_train_dataloader())
    assert all(batch.meta["labelled"].tolist() == [True, True, False, False] for batch in batches)
    assert len(batches) >= 5  # nine images, two in each
    whole.train()
    again = run("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(weights(whole), weights(again)) == 0
    alone = run("alone")
    alone.set_objective(Objective())
    assert all(batch.meta["labelled"].all() for batch in alone.get_train_dataloader())
