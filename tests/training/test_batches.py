"""A batch knows its samples, and no model ever sees what it knows."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from cankd_hf.data.common.batch import Batch, BatchCollator
from cankd_hf.data.common.views import SeededDataset

from .tiny_trainers import Images, student, trainer


def stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A collator of somebody who knows nothing of batches."""
    assert all("meta" not in sample for sample in samples)
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def test_the_collator_parts_inputs_and_meta() -> None:
    data = SeededDataset(Images(6), seed=3)
    data.set_epoch(2)
    unlabelled = {"pixel_values": data[5]["pixel_values"]}
    batch = BatchCollator(stack)([data[4], data[1]])
    assert batch.keys() == {"pixel_values", "labels", "meta"} and batch.inputs.keys() == {"pixel_values", "labels"}
    assert batch.meta["sample"].tolist() == [4, 1] and batch.meta["view"].tolist() == [2, 2]
    assert batch.meta["labelled"].tolist() == [True, True]
    plain = BatchCollator(stack)([unlabelled])
    assert plain.meta["sample"].tolist() == [-1] and plain.meta["labelled"].tolist() == [False]
    assert Batch({"pixel_values": 1}).meta == {}
    assert pickle.loads(pickle.dumps(BatchCollator(stack))).collate is stack


def test_a_view_fixes_the_augmentation() -> None:
    one, two = (SeededDataset(Images(4, noisy=True), seed=3) for _ in range(2))
    one.set_epoch(1)
    assert not torch.equal(one[2]["pixel_values"], two[2]["pixel_values"])
    two.set_epoch(1)
    torch.randn(7)
    assert torch.equal(one[2]["pixel_values"], two[2]["pixel_values"])


def test_a_data_set_with_a_meta_of_its_own_keeps_it_for_its_collator(tmp_path: Path) -> None:
    class Named(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "meta": {"file": f"{index}.png"}}

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(sample.pop("meta")["file"] for sample in samples)
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    seen: list[str] = []
    made = trainer(tmp_path, data=Named(16), eval_dataset=Named(4), data_collator=collate)
    made.train()
    assert sorted(seen) == sorted(f"{index}.png" for index in range(16))
    assert made.evaluate()["eval_loss"] > 0 and seen[16:] == ["0.png", "1.png", "2.png", "3.png"]
    assert BatchCollator(collate)([made.train_dataset[3]]).meta["sample"].tolist() == [3]


def test_meta_reaches_the_source_and_no_model(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    metas: list[dict[str, Any]] = []
    model = student()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    made = trainer(
        tmp_path,
        data=Images(8),
        model=model,
        per_device_train_batch_size=4,
        max_steps=4,
        data_collator=stack,
        eval_dataset=Images(4),
    )
    live = made.source

    def source(batch: Batch, names: Any = None) -> Any:
        metas.append(batch.meta)
        return live(batch, names)

    made.source = source
    seen.clear()
    made.train()
    made.evaluate()
    assert seen and all("meta" not in kwargs for kwargs in seen)
    epochs = [torch.cat([meta["sample"] for meta in part]) for part in (metas[:2], metas[2:4])]
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert [meta["view"].unique().tolist() for meta in metas] == [[0], [0], [1], [1]]
    assert all(meta["labelled"].all() for meta in metas)
