"""The data-loading methods of `CanKDTrainer`."""

import inspect
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import has_length

from cankd_hf.data.common.batch import META, NORMALIZE, OF_PICTURES, Batch, BatchCollator
from cankd_hf.data.common.views import SeededDataset, unnormalized
from cankd_hf.errors import InputError
from cankd_hf.training.base import TeachingTrainer


class LoadingMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for data loaders."""

    _signature_columns: Any

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # With persistent workers the Trainer keeps one loader for all data sets given here: those of the first one.
        return self.get_test_dataloader(eval_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in the Trainer, which would end without a step, as if all was well, where there is no batch."""
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            dataset: Any = self.train_dataset
            batch = self.args.train_batch_size * self.args.world_size
            raise InputError(
                f"train_dataset: {len(dataset)} images make no whole batch of {batch}, and dataloader_drop_last "
                "leaves out the others; set it to false, or per_device_train_batch_size to fewer"
            )
        return loader

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        collator = self.data_collator
        if isinstance(collator, BatchCollator) and collator.takes_bytes:
            dataset = unnormalized(dataset)
        drops = self.args.dataloader_drop_last
        # In evaluation every image counts.
        self.args.dataloader_drop_last = drops and kwargs.get("is_training", False)
        try:
            loader = super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops
        if self.args.dataloader_num_workers and self.args.dataloader_persistent_workers:
            # Workers get their seed when they start. A resumed run starts them at another time than an uninterrupted
            # one, so the seed must not be drawn from the random numbers of dropout.
            getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self.close_loaders()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # Samplers by length read columns of the user's data set.
        return super()._get_train_sampler(dataset.dataset if isinstance(dataset, SeededDataset) else dataset)

    def _set_signature_columns_if_needed(self) -> None:
        """With `remove_unused_columns`, what the student takes is kept, not what the module around it names."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [
                *inspect.signature(self.student.forward).parameters,
                *self.label_names,
                META,
                NORMALIZE,
                *OF_PICTURES,
            ]

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Batch) and inputs.later is not None:  # of a loader that accelerate did not prepare
            inputs = inputs.to(self.args.device)
        return super()._prepare_inputs(inputs)
