"""The Hub methods of the Trainer: every push holds the student alone, with its code and card."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from cankd_hf.errors import InputError
from cankd_hf.hub.card import write_card
from cankd_hf.hub.upload import open_repo, plan, push, push_in_background
from cankd_hf.training.arguments import CanKDConfig

logger = logging.getLogger(__name__)


class StudentHubMixin(Trainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for the Hub.

    All values of `hub_strategy` work. `checkpoint` and `all_checkpoints` put the student of each checkpoint into
    `last-checkpoint/` or `checkpoint-N/` of the repository too (`from_pretrained(id, subfolder=...)`); optimizer,
    connectors and random states are not pushed, so a run is resumed from its own folder.
    """

    args: CanKDConfig
    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository; bad names, missing rights and a missing token are reported before any training."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir or "").absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id, _ = open_repo(name, private, self.args.hub_revision, token)
        self.push_in_progress = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the card beside the student, from what was recorded and what is given here.

        Args:
            language: of the metadata.
            license: the student's licence, a Hub identifier such as `apache-2.0`.
            tags: further tags.
            model_name: title of the card.
            finetuned_from: Hub id of a model that the student descends from, listed before those that are recorded.
            tasks: task identifiers of the scores; default: the pipeline's.
            dataset_tags: Hub ids of data sets.
            dataset: names of the data sets of the scores; default: that of the recipe.
            dataset_args: arguments of the data sets of the scores.
        """
        if self.is_world_process_zero():
            given = {"language": language, "finetuned_from": finetuned_from, "tasks": tasks}
            given |= {"dataset_tags": dataset_tags, "dataset": dataset, "dataset_args": dataset_args}
            more = [tags] if isinstance(tags, str) else list(tags or ())
            write_card(self.args.output_dir or "", licence=license, tags=more, title=model_name, more=given)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the student to `output_dir` and pushes it with its card.

        Args:
            commit_message: of the one commit.
            blocking: wait until it is there.
            token: instead of the one that is signed in.
            revision: branch; default `hub_revision`, else main.
            private: whether a new repository is private; default `hub_private_repo`.
            kwargs: of `create_model_card`.

        Returns:
            The commit, or a Future of it; None on processes other than the first.

        Raises:
            InputError: if the Hub refuses; the student is saved all the same, and the push can be repeated.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Before the Hub is asked for anything: whatever happens there, the student is safe here.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        revision = self.args.hub_revision if revision is None else revision
        if revision is not None:
            open_repo(self.hub_model_id, revision=revision, token=token)
        uploads = plan(self.args.output_dir or "", self.hub_model_id)
        send = push if blocking else push_in_background
        return send(uploads, self.hub_model_id, commit_message or "Student", revision, token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint's student while training continues; a failure is logged and does not stop it."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        pending = self.push_in_progress
        if not self.args.hub_always_push and pending is not None and not pending.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        own = Path(checkpoint_folder).name
        places = {HubStrategy.CHECKPOINT: ("", "last-checkpoint"), HubStrategy.ALL_CHECKPOINTS: ("", own)}
        subfolders = places.get(HubStrategy(strategy), ("",))
        try:
            uploads = plan(checkpoint_folder, self.hub_model_id, subfolders)
            message = f"Training in progress, {when}"
            job = push_in_background(uploads, self.hub_model_id, message, self.args.hub_revision)
        except (InputError, OSError) as error:
            logger.warning("Training in progress, %s, was not pushed: %s", when, error)
            return
        if pending is None or pending.is_done():
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # a list, whatever it says
        else:
            pending.jobs.append(job)
