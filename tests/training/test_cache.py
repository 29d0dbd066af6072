"""Stored teachers in whole trainings: what is replayed, what is computed live, and what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cankd_hf.config.distill import LossTerm
from cankd_hf.config.teacher import CacheConfig, TeacherConfig
from cankd_hf.data.common.batch import Batch
from cankd_hf.errors import InputError
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.teachers import store_files
from cankd_hf.teachers.identity import identity
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.pictures import Views
from cankd_hf.teachers.stored import StoredTeachers
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.monitoring.cost import CostMeter
from cankd_hf.training.trainer import CanKDTrainer

from .detector_trainers import NAMES, Boxed
from .tiny_trainers import CLASSES, Images, dinov2, largest_difference, terms, trainer, weights

STEPS = {"max_steps": 8, "per_device_train_batch_size": 4}
FPN = {
    "model_type": "cankd_fpn",
    "num_labels": CLASSES,
    "fpn_channels": 8,
    "head_channels": 8,
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4},
}


def cached(folder: Path, seed: int = 5, **changes: Any) -> Teacher:
    """A teacher whose answers are stored, with the same weights for one seed."""
    settings = {"views": 4, "codec": "exact", "folder": str(folder), **changes.pop("cache", {})}
    return load_teacher(TeacherConfig(**{"config": dinov2(), "cache": CacheConfig(**settings), **changes}), seed=seed)


def live(seed: int = 5, **changes: Any) -> Teacher:
    return load_teacher(TeacherConfig(**{"config": dinov2(), **changes}), seed=seed)


def run(folder: Path, one: Teacher, data: Any = None, **changes: Any) -> CanKDTrainer:
    made = trainer(folder, data or Images(16, noisy=True), teacher=one, **{**STEPS, **changes})
    made.train()
    return made


def found(made: CanKDTrainer) -> tuple[int, int]:
    (facts,) = made.cache_facts().values()
    return facts["hits"], facts["misses"]


@pytest.mark.parametrize("codec", ["exact", pytest.param("pca", marks=pytest.mark.slow)])
def test_a_run_that_reads_is_the_run_that_filled(codec: str, tmp_path: Path) -> None:
    """With `exact` both are the run without a cache, bit for bit; the teacher is run in neither view twice."""
    plain = run(tmp_path / "plain", live())
    filled = run(tmp_path / "a", cached(tmp_path / "s", cache={"codec": codec}))
    last = cached(tmp_path / "s", cache={"codec": codec})
    last.register_forward_pre_hook(lambda *_: pytest.fail("the teacher is run although all is stored"))
    read = run(tmp_path / "b", last)
    assert largest_difference(weights(filled), weights(read)) == 0.0
    assert (largest_difference(weights(plain), weights(filled)) == 0.0) == (codec == "exact")
    assert largest_difference(weights(plain), weights(filled)) < 5e-3
    assert (found(filled), found(read)) == ((0, 32), (32, 0))
    shares = [
        [entry["teacher_cache_hits"] for entry in one.state.log_history if "loss" in entry] for one in (filled, read)
    ]
    assert shares == [[0.0] * 8, [1.0] * 8]


@pytest.mark.slow
def test_pictures_repeat_after_the_views_and_the_teacher_is_left_alone(tmp_path: Path) -> None:
    made = run(tmp_path / "a", cached(tmp_path / "s", cache={"views": 1}))
    assert found(made) == (16, 16)
    first = made.train_dataset[3]["pixel_values"]
    made.train_dataset.set_epoch(5)
    assert torch.equal(made.train_dataset[3]["pixel_values"], first)


@pytest.mark.slow
def test_seeds_share_the_pictures_where_the_cache_has_a_seed(tmp_path: Path) -> None:
    for number, (seed, views) in enumerate([(1, {"seed": 0}), (2, {"seed": 0}), (3, {})]):
        made = run(tmp_path / str(number), cached(tmp_path / "s", cache={"views": 2, **views}), seed=seed)
        assert found(made) == ((32, 0) if number == 1 else (0, 32))


@pytest.mark.slow
def test_another_teacher_gets_none_of_it(tmp_path: Path) -> None:
    run(tmp_path / "a", cached(tmp_path / "s"), max_steps=1)
    assert found(run(tmp_path / "b", cached(tmp_path / "s", 6), max_steps=1)) == (0, 4)
    assert found(run(tmp_path / "c", cached(tmp_path / "s"), max_steps=1)) == (4, 0)


def test_all_that_an_answer_depends_on_is_in_the_identity() -> None:
    def known(one: Teacher, codec: str = "exact") -> dict[str, Any]:
        return identity(one, torch.device("cpu"), codec)

    base = known(live())
    assert known(live()) == base
    heads = {**dinov2(), "num_attention_heads": 4}
    changed = [live(6), live(scale=2.0), live(image_mean=[0.1, 0.1, 0.1]), live(dtype="bfloat16"), live(config=heads)]
    changed.append(live(taps=["encoder.layer.0"]))
    normalised = live()
    normalised.set_input_stats([0.5] * 3, [0.5] * 3)
    assert all(known(one) != base for one in (*changed, normalised)) and known(live(), "fp16") != base
    other = live()
    for name, parameter in (*other.model.named_parameters(), *other.model.named_buffers()):
        before = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1
        assert known(other) != base, name
        parameter.data.copy_(before)
    assert known(other) == base


class Brighter(Images):
    """The same images, augmented by other code."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "pixel_values": sample["pixel_values"] * 1.01}


@pytest.mark.slow
def test_changed_augmentation_is_computed_live_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "a", cached(tmp_path / "s", cache={"views": 2}))
    plain = run(tmp_path / "plain", live(), Brighter(16, noisy=True), max_steps=8)
    changed = run(tmp_path / "b", cached(tmp_path / "s", cache={"views": 2}), Brighter(16, noisy=True), max_steps=8)
    assert found(changed) == (0, 32) and largest_difference(weights(plain), weights(changed)) == 0.0
    forgetful = trainer(
        tmp_path / "c",
        Images(16, noisy=True),
        teacher=cached(tmp_path / "t", cache={"views": 1}),
        max_steps=12,
        per_device_train_batch_size=4,
    )
    forgetful.train_dataset.views = None  # pictures that do not repeat though they should
    forgetful.train()
    assert "32 pictures had no stored answer, and were computed live. 32: no answer" in caplog.text


def test_a_full_disk_stops_nothing_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(tmp_path / "plain", live())
    usage = shutil.disk_usage(tmp_path)
    made = trainer(tmp_path / "a", Images(16, noisy=True), teacher=cached(tmp_path / "s"), **STEPS)
    made.open_stores()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=store_files.MARGIN))
    made.train()
    assert largest_difference(weights(plain), weights(made)) == 0.0
    assert caplog.text.count("nothing more is stored") == 1
    with pytest.raises(InputError, match="teacher.cache.folder: .*fewer views or a smaller codec"):
        run(tmp_path / "b", cached(tmp_path / "t"))
    assert not (tmp_path / "t").exists(), "it is refused before anything is written"


def test_what_others_paid_is_charged(tmp_path: Path) -> None:
    run(tmp_path / "a", cached(tmp_path / "s"))
    charged = []
    for steps in (4, 8):
        made = trainer(
            tmp_path / "b",
            Images(16, noisy=True),
            teacher=cached(tmp_path / "s"),
            max_steps=steps,
            per_device_train_batch_size=4,
        )
        meter = CostMeter()
        made.add_callback(meter)
        made.train()
        (name,) = meter.prepaid
        charged.append(meter.prepaid[name]["cpu_seconds"])
        assert meter.cost["cpu_seconds_prepaid"] == pytest.approx(charged[-1], abs=2e-3)
        (one,) = made.stored.values()
        key = one.store.folder.name[:6]
        assert name == f"teacher cache {key}"
        assert made.state.log_history[-1]["teacher_cache_seconds"][key]["cpu_seconds"] == charged[-1]
    assert one.store.header["cost"]["cpu_seconds"] < charged[0] < charged[1]
    assert charged[1] == pytest.approx(one.store.spent()["cpu_seconds"]), "all answers, each once, and the fit"


def test_stores_are_charged_each_by_itself(tmp_path: Path) -> None:
    """A phase that reads another store than the one before adds its cost; one that reads the same, pays once."""
    meter = CostMeter()
    for name in ("s", "t", "s"):
        of = {"s": 5, "t": 6}[name]
        if not (tmp_path / name).exists():
            run(tmp_path / f"fills {name}", cached(tmp_path / name, of))
        made = trainer(tmp_path / "a", Images(16, noisy=True), teacher=cached(tmp_path / name, of), **STEPS)
        made.add_callback(meter)
        made.train()
        (one,) = made.stored.values()
        paid = meter.prepaid[f"teacher cache {one.store.folder.name[:6]}"]
        assert paid["cpu_seconds"] == pytest.approx(one.store.spent()["cpu_seconds"])
    assert len(meter.prepaid) == 2


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_and_pays_once(tmp_path: Path) -> None:
    settings = {**STEPS, "save_strategy": "steps", "save_steps": 4}
    whole = run(tmp_path / "a", cached(tmp_path / "s"), **settings)
    first = run(tmp_path / "b", cached(tmp_path / "t"), **{**settings, "max_steps": 4})
    resumed = trainer(tmp_path / "b", Images(16, noisy=True), teacher=cached(tmp_path / "t"), **settings)
    meter = CostMeter()
    resumed.add_callback(meter)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert largest_difference(weights(whole), weights(resumed)) == 0.0
    assert found(first) == (0, 16) and found(resumed) == (0, 16) and not meter.prepaid
    again = run(tmp_path / "c", cached(tmp_path / "t"), **settings)
    assert found(again) == (32, 0) and largest_difference(weights(again), weights(whole)) == 0.0


def test_a_stored_teacher_is_the_same_before_and_after_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(tmp_path, cached(tmp_path), max_steps=1)
    teacher = made.teachers["teacher"]
    assert teacher.destination == "cpu"
    # On CUDA `auto` is bfloat16, and a teacher whose answers are all there never leaves the CPU: checkpoints of a run
    # that asked it, and of one that did not, name the same teacher, or the first could not be resumed.
    kinds = {"cuda": torch.bfloat16, "cpu": torch.float32}
    monkeypatch.setattr("cankd_hf.teachers.teacher.auto_dtype", kinds.__getitem__)
    assert teacher.manifest()["dtype"] == "float32"
    teacher.destination = "cuda"
    assert (teacher.manifest()["dtype"], teacher.dtype) == ("bfloat16", torch.float32)
    assert identity(teacher, torch.device("cuda"), "exact")["dtype"] == "bfloat16"


def detector() -> FPNForObjectDetection:
    settings = {**FPN, "head": "fcos", "head_layers": 1, "id2label": NAMES, "num_labels": 3}
    return FPNForObjectDetection(FPNConfig(**{key: value for key, value in settings.items() if key != "model_type"}))


def batches(made: CanKDTrainer) -> list[Batch]:
    return list(made.first_batches(2))


@pytest.mark.parametrize("codec", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("fp16", "int8")), "pca"])
@pytest.mark.parametrize("task", ["features", "segmentation", "detection"])
def test_stored_answers_are_the_live_ones_within_the_bound(task: str, codec: str, tmp_path: Path) -> None:
    cache = CacheConfig(views=2, codec=codec, folder=str(tmp_path / "s"))  # type: ignore[arg-type]
    both = [LossTerm(loss="instance_mse"), LossTerm(loss="kl", options={"temperature": 4.0})]
    dense = [LossTerm(loss="dense_logits")]
    given: dict[str, tuple[Any, dict[str, Any]]] = {
        "features": (load_teacher(TeacherConfig(config=dinov2(), cache=cache), seed=1), {"terms": terms()}),
        "segmentation": (load_teacher(TeacherConfig(config=FPN, cache=cache), seed=1), {"terms": both}),
        "detection": (
            Teacher(detector(), TeacherConfig(cache=cache)),
            {"terms": dense, "model": detector(), "data": Boxed(8)},
        ),
    }
    one, settings = given[task]
    made = trainer(tmp_path / "a", settings.pop("data", None), teacher=one, per_device_train_batch_size=4, **settings)
    made.open_stores()
    assert isinstance(made.source, StoredTeachers)
    for batch in batches(made):
        made.source(batch)
    reread = made.source.stored["teacher"]
    kinds = {name: item.kind for name, item in reread.rows.codecs.items()}
    assert (
        kinds.get("logits")
        == {"features": None, "segmentation": codec if codec == "fp16" else "int8", "detection": None}[task]
    )
    assert kinds.get("maps.0", codec) == ("pca" if codec == "pca" else "fp16" if task != "detection" else codec)
    for batch in batches(made):
        replayed, exact = made.source(batch)["teacher"], one(batch.teacher_images)
        for group in reread.stored(batch["pictures"], made.args.device):
            errors = reread.differences(Views(batch), group)
            assert len(group.places) == 4 and bool(reread.rows.within(errors).all())
        for stored, computed in zip(replayed.maps, exact.maps, strict=True):
            assert not stored.numel() or torch.allclose(stored, computed, atol=0.05 * float(computed.abs().max()))
        if exact.dense is not None and replayed.dense is not None:
            assert replayed.dense.keys() == exact.dense.keys()
            scores = [x["class_logits"].sigmoid() for x in (replayed.dense, exact.dense)]
            assert float((scores[0] - scores[1]).abs().max()) < 1e-3
    hits, misses = reread.found.hits, reread.found.misses
    assert hits == misses > 0


@pytest.mark.slow
def test_an_arm_reads_what_another_arm_needed_more_of(tmp_path: Path) -> None:
    """Maps and logits were stored; a run that reads the maps alone finds them, and stores what both can use."""

    def one() -> Teacher:
        cache = CacheConfig(views=2, codec="exact", folder=str(tmp_path / "s"))
        return load_teacher(TeacherConfig(config=FPN, cache=cache), seed=1)

    both = [LossTerm(loss="instance_mse"), LossTerm(loss="kl")]
    run(tmp_path / "a", one(), terms=both, max_steps=4)
    maps = run(tmp_path / "b", one(), terms=both[:1], max_steps=8)
    assert found(maps) == (16, 16)
    assert found(run(tmp_path / "c", one(), terms=both, max_steps=8)) == (32, 0)


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(Images(4))


def test_streams_and_teachers_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher.cache: its pictures repeat by their numbers"):
        trainer(tmp_path, Endless(), teacher=cached(tmp_path))
    two = {"a": cached(tmp_path, cache={"views": 2}), "b": cached(tmp_path, cache={"views": 3})}
    both = [LossTerm(loss="instance_mse", teacher=name, name=name) for name in two]
    with pytest.raises(InputError, match="one number of views"):
        trainer(tmp_path, teacher=None, teachers=two, terms=both)


@pytest.mark.slow
def test_a_store_of_elsewhere_is_compared_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = run(tmp_path / "a", cached(tmp_path / "s"), max_steps=2)
    file = next(iter(made.stored.values())).store.folder / "header.json"
    header = json.loads(file.read_text())
    header["machine"]["torch"] = "1.0"
    file.write_text(json.dumps(header))
    assert found(run(tmp_path / "b", cached(tmp_path / "s"), max_steps=2)) == (8, 0)
    other = trainer(tmp_path / "c", Images(16, noisy=True), teacher=cached(tmp_path / "s", 6), **STEPS)
    file.write_text(json.dumps({**header, "identity": other._identity("teacher")}))  # as if it was this teacher's
    other.train()
    assert "it is not used" in caplog.text and found(other) == (0, 32)
