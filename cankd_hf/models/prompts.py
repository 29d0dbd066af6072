"""Zero-shot detectors: Grounding DINO as a detector of fixed classes, all named in one prompt.

"red blood cell. platelets." has two phrases; the model scores every box against every token of the prompt. Its loss in
`transformers` takes class k to be phrase k, so the prompt names the classes in the order of their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

from cankd_hf.errors import InputError
from cankd_hf.models.backbones import first_line

# Model types that can be trained on a prompt of fixed classes.
PROMPTED = ("grounding-dino", "mm-grounding-dino")
# [CLS] . [SEP] in BERT's vocabulary, whose ids are constants in the code of both.
NO_WORDS = (101, 1012, 102)


class TextInput:
    """A forward pre-hook that gives a model its text (inputs `[1, T]` or None by name) along with its images.

    The text is repeated for every image of a batch; its tokenizer is saved with the model.
    """

    def __init__(self, text: Mapping[str, Tensor | None], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.text = dict(text)
        self.tokenizer = tokenizer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1 or any(name in kwargs for name in self.text):
            return None
        kwargs = {"pixel_values": args[0], **kwargs} if args else dict(kwargs)
        pixels = kwargs["pixel_values"]
        for name, value in self.text.items():
            there = None if value is None else value.to(pixels.device, non_blocking=True)
            kwargs[name] = None if there is None else there.expand(len(pixels), -1)
        return (), kwargs


class ImageTextProcessor(GroundingDinoImageProcessor):
    """An image processor (with these `settings`) that is saved with a tokenizer, as Grounding DINO's processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings, self._tokenizer = settings, tokenizer

    def save_pretrained(self, save_directory: str | PathLike[Any], push_to_hub: bool = False, **kwargs: Any) -> Any:
        images = GroundingDinoImageProcessor(**self._settings)
        return GroundingDinoProcessor(images, self._tokenizer).save_pretrained(save_directory, push_to_hub, **kwargs)


def text_input(model: nn.Module) -> TextInput | None:
    """The text given to a model by `attach_prompt` or `attach_empty_prompt`, if any."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, TextInput)), None)


def reads_text(model: PreTrainedModel) -> bool:
    """Whether a model is a detector that needs a text with every image."""
    return model.config.model_type in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES


def attach_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
    """Makes a zero-shot detector (of a type in `PROMPTED`) one of fixed classes, which takes only images.

    The saved model is the same as before; `input_ids` given by a caller have precedence. Raises InputError like
    `read_prompt`.
    """
    _attach(model, TextInput(read_prompt(tokenizer, names, model.config.max_text_len), tokenizer))


def attach_empty_prompt(model: nn.Module) -> None:
    """Lets a zero-shot detector run without a text, for teachers, whose maps are taken before images and text meet."""
    if isinstance(model, PreTrainedModel) and reads_text(model) and text_input(model) is None:
        if model.config.model_type in PROMPTED:  # the text is encoded first
            _attach(model, TextInput({"input_ids": torch.tensor([NO_WORDS])}))
        elif model.config.model_type == "omdet-turbo":  # the text is encoded last
            tokens = ("classes_input_ids", "classes_attention_mask", "tasks_input_ids", "tasks_attention_mask")
            _attach(model, TextInput(dict.fromkeys((*tokens, "classes_structure"))))


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's local folder or Hub repository. Raises InputError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{source}: expected the tokenizer that a detector of this kind reads its class names with, found none "
            f"({first_line(error)}); name a folder or Hub id that holds it as student.tokenizer"
        ) from error


def read_prompt(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], longest: int) -> dict[str, Tensor]:
    """Class names -> one prompt, in which phrase k is class k: inputs by name, int64 `[1, T]`.

    Names are converted to lower case, with spaces for `_`, `.` and `?`. Raises InputError if the prompt is longer than
    `longest` tokens, or does not have one phrase per class, all different.
    """
    words = [" ".join(re.sub(r"[._?]", " ", name).lower().split()) for name in names]
    text = ". ".join(words) + "."
    read = tokenizer(text, return_tensors="pt", return_token_type_ids=True)
    ids = read["input_ids"]
    if ids.shape[1] > longest:
        raise InputError(
            f"student: the prompt of {len(names)} class names has {ids.shape[1]} tokens, the model reads {longest}; "
            "give the classes shorter names in data.labels, or train on fewer"
        )
    phrases = [tuple(ids[0, row.bool()].tolist()) for row in _phrases(ids, ids.shape[1])[0]]
    if len(phrases) != len(names) or len(set(phrases)) != len(phrases):
        raise InputError(
            f"student: expected {len(names)} different phrases in the prompt {text[:200]!r}, one a class; its "
            f"tokenizer makes {len(set(phrases))} of {ids[0, :50].tolist()}; give the classes other names in "
            "data.labels, or the student the tokenizer of its pretraining (student.tokenizer)"
        )
    return {name: read[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def phrase_probabilities(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Token scores -> class scores `[B, N, K]` in 0..1, float32: the mean over the tokens of each phrase.

    `logits` are those of every box against every token, `[B, N, L]`, -inf after the end of the prompt; `input_ids` are
    `[B, T]`, T <= L, with the same number of phrases in every prompt.
    """
    phrases = torch.stack(_phrases(input_ids, logits.shape[-1])).to(logits.device, torch.float32)
    return logits.float().sigmoid() @ (phrases / phrases.sum(dim=-1, keepdim=True)).transpose(1, 2)


def _attach(model: nn.Module, text: TextInput) -> None:
    attached = next((key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, TextInput)), None)
    if attached is None:
        model.register_forward_pre_hook(text, prepend=True, with_kwargs=True)
    else:
        model._forward_pre_hooks[attached] = text


def _phrases(input_ids: Tensor, length: int) -> list[Tensor]:
    """The tokens of each phrase, [K, length] for each prompt, as in the loss."""
    from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

    return list(build_label_maps(input_ids.new_empty(1, 1, length), cast(torch.LongTensor, input_ids)))
