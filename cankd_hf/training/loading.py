"""The data-loading methods of `CanKDTrainer`."""

import inspect
from typing import Any

from torch.utils.data import DataLoader, Sampler

from cankd_hf.data.common.batch import META
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.training.base import TeachingTrainer


class LoadingMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for data loaders."""

    _signature_columns: Any

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # With persistent workers the Trainer keeps one loader for all data sets given here: those of the first one.
        return self.get_test_dataloader(eval_dataset)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        drops = self.args.dataloader_drop_last
        # In evaluation every image counts.
        self.args.dataloader_drop_last = drops and kwargs.get("is_training", False)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # Samplers by length read columns of the user's data set.
        return super()._get_train_sampler(dataset.dataset if isinstance(dataset, SeededDataset) else dataset)

    def _set_signature_columns_if_needed(self) -> None:
        """With `remove_unused_columns`, what the student takes is kept, not what the module around it names."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*inspect.signature(self.student.forward).parameters, *self.label_names, META]
