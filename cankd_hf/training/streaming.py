"""Streams (`IterableDataset`) in training and evaluation, in one process or several."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_pt_utils import find_batch_size

from cankd_hf.data.common.batch import Batch
from cankd_hf.data.common.shares import InOrder, StreamShare
from cankd_hf.data.common.unlabelled_stream import SharedOut, StreamWithUnlabelled
from cankd_hf.errors import InputError
from cankd_hf.training.base import TeachingTrainer


class CountedLoader:
    """A data loader that notes which images of the present batch count, over all processes.

    `images` is the number of those that counted so far.
    """

    def __init__(self, loader: DataLoader[Any], accelerator: Accelerator) -> None:
        self.loader, self.accelerator = loader, accelerator
        self.images = self._size = 0
        self._counts: Tensor | None = None  # with one process all do

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self._size = find_batch_size(batch) or 0
            if self.accelerator.num_processes == 1:
                self.images += self._size
                yield batch
                continue
            repeated = Batch(batch).meta.get("repeated")
            if repeated is None:  # of a collator that is not the Trainer's
                repeated = torch.zeros(self._size, dtype=torch.bool)
            self._counts = ~self.accelerator.gather(repeated.to(self.accelerator.device))
            self.images += int(self._counts.sum())
            yield batch

    def gather(self, data: Any) -> Any:
        """The rows of all processes that count. A loss comes repeated for a full batch: it is cut to this one."""
        if is_ragged(data):
            found = gather_object(data[: self._size])
            if self._counts is None:
                return found
            return [item for item, counts in zip(found, self._counts.tolist(), strict=True) if counts]
        return recursively_apply(self._rows, data)

    def _rows(self, value: Tensor) -> Tensor:
        if value.ndim == 0:  # one number for the batch
            return cast(Tensor, self.accelerator.gather(value))
        gathered = cast(Tensor, self.accelerator.gather(value[: self._size]))
        return gathered if self._counts is None else gathered[self._counts.to(gathered.device)]


def is_ragged(data: Any) -> bool:
    """Whether these are labels in a list with a dict for each image, which must not be cut like a tensor."""
    return isinstance(data, list) and any(isinstance(item, Mapping) for item in data)


class StreamingMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for streams.

    By default accelerate reads a stream in the first process, joins the batches and cuts them for the others. That
    needs tensors of one size with a row for each image: it cuts boxes off, on a single process too.
    """

    def set_dispatch(self) -> None:
        """Has each process read its own batches.

        Raises:
            InputError: where the arguments ask for something else.
        """
        config = self.accelerator.dataloader_config
        place = "training.accelerator_config"
        if config.dispatch_batches:
            raise InputError(f"{place}.dispatch_batches: cuts boxes and masks of several sizes; leave it out")
        if not config.even_batches and self.args.world_size > 1:
            raise InputError(f"{place}.even_batches: without it processes wait for each other forever; leave it out")
        config.dispatch_batches = False

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader[Any]:
        training = kwargs.get("is_training", False)
        if not isinstance(dataset, IterableDataset):
            if training or self.args.world_size == 1:
                return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
            # accelerate fills the last batches with other images, which would count in the loss.
            dataset = InOrder(dataset, batch_size * self.args.world_size)
        block = 1 if training else batch_size
        whole = batch_size if training and self.args.dataloader_drop_last else 0
        place = self.args.process_index, self.args.world_size
        share: IterableDataset[Any] = (
            SharedOut(dataset, batch_size, *place)
            if isinstance(dataset, StreamWithUnlabelled)
            else StreamShare(dataset, *place, block, whole)
        )
        loader = super()._get_dataloader(share, description, batch_size, *args, **kwargs)
        if isinstance(loader.dataset, IterableDatasetShard):
            # Its samples are this process's already.
            loader.dataset.batch_size = loader.dataset.num_processes = 1
            loader.dataset.process_index = 0
        return loader

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(dataloader, "dataset", None), IterableDataset):
            return super().evaluation_loop(dataloader, *args, **kwargs)
        counted: Any = CountedLoader(dataloader, self.accelerator)
        usual = self.gather_function
        self.gather_function = counted.gather
        try:
            output = super().evaluation_loop(counted, *args, **kwargs)
        finally:
            self.gather_function = usual
        return output._replace(num_samples=counted.images)
