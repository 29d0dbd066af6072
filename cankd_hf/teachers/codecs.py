"""Codecs: how the outputs of a teacher become bytes of a store, and what that costs in accuracy."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from cankd_hf.teachers.teacher import TeacherOutput

logger = logging.getLogger(__name__)

COMPONENTS = 256  # channels that are kept of a map, at most
CLIP = 16.0  # logits further below the largest one than so many temperatures are stored as if they were there
KL_BOUND = 1e-3  # of int8 logits at the temperature in use, a mean over positions
HALF_BOUND = 1e-3  # relative error of float16, which rounds each value by at most 2^-11 of it
_ALIGN = 16  # bytes: fields of a row are read as numbers where they lie
_TINY = 1e-12


class Codec:
    """Turns a field of a teacher's output `[B, ...]` into parts `[B, ...]` and back; knows how far off that is.

    Attributes:
        kind: its name in headers.
        bound: the largest `error` of a picture that may be stored.
        error_of: what the error is.
    """

    kind: ClassVar[str]
    error_of: ClassVar[str] = "relative error"
    bound: float = 0.0

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        """The parts that are stored, each `[B, ...]`."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The field of its parts."""
        raise NotImplementedError

    def error(self, value: Tensor, decoded: Tensor) -> Tensor:
        """How far the decoded field of each picture is from its value, `[B]`."""
        value, decoded = (x.reshape(len(x), -1).float() for x in (value, decoded))
        off: Tensor = vector_norm(value - decoded, dim=1) / vector_norm(value, dim=1).clamp_min(_TINY)
        return off

    def add(self, value: Tensor) -> None:
        """Learns from a field, where the codec is fitted."""

    def settle(self, value: Tensor) -> None:
        """Ends the fit, before the last field, which measures it."""

    def settings(self) -> dict[str, Any]:
        """What makes the same codec again, as plain data."""
        return {"kind": self.kind, "bound": self.bound}

    def tensors(self) -> dict[str, Tensor]:
        """The fitted values."""
        return {}


class Exact(Codec):
    """Bit for bit, in the dtype and the memory layout of the teacher."""

    kind = "exact"

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        return {"value": value}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["value"]


class Half(Codec):
    """float16."""

    kind = "fp16"
    bound = HALF_BOUND

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        return {"value": value.half()}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["value"]


class Shifted(Codec):
    """Logits in int8: their distance to the largest one of the position, clipped at 16 temperatures, and that one.

    Args:
        temperature: the largest one at which the logits are read.
    """

    kind = "int8"
    error_of = "KL"
    bound = KL_BOUND

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._step = CLIP * temperature / 255

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        value = value.float()
        top = value.amax(1, keepdim=True)
        below = ((top - value) / self._step).round().clamp(0, 255)
        return {"below": below.to(torch.uint8), "top": top.half()}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["top"].float() - parts["below"].float() * self._step

    def error(self, value: Tensor, decoded: Tensor) -> Tensor:
        """KL(exact || decoded) at the temperature, a mean over the positions of each picture."""
        p, q = ((x.float() / self.temperature).log_softmax(1) for x in (value, decoded))
        return (p.exp() * (p - q)).sum(1).flatten(1).mean(1) if value.ndim > 2 else (p.exp() * (p - q)).sum(1)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "temperature": self.temperature}


class Components(Codec):
    """Maps in int8 after a projection on the principal components of their channels.

    Fitted on the first batches; `error` is relative to how much a map varies over its positions. Maps of pictures that
    are more than twice as far off as the worst one of the fit are not stored.
    """

    kind = "pca"

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self.mean = self.basis = torch.empty(0)

    def add(self, value: Tensor) -> None:
        cells = value.float().transpose(0, 1).flatten(1)  # [C, positions]
        found = [cells.sum(1).double(), (cells @ cells.T).double(), cells.new_tensor(cells.shape[1])]
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def settle(self, value: Tensor) -> None:
        if not self._sums:  # there is one batch only
            self.add(value)
        total, products, count = self._sums
        mean = total / count
        covariance = products / count - mean[:, None] * mean[None]
        kept = min(COMPONENTS, len(mean))
        basis = torch.linalg.eigh(covariance)[1].flip(1)[:, :kept]
        self.mean, self.basis, self._sums = mean.float(), basis.float().contiguous(), []

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        cells = value.float().flatten(2) - self.mean.to(value.device)[:, None]
        found = self.basis.to(value.device).T @ cells  # [B, components, positions]
        scale = found.abs().amax(2, keepdim=True).clamp_min(_TINY) / 127
        whole = (found / scale).round().clamp(-127, 127).to(torch.int8)
        return {"components": whole.unflatten(2, tuple(value.shape[2:])), "scale": scale.squeeze(2)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        whole, scale = parts["components"], parts["scale"]
        if self.basis.device != scale.device:
            self.mean, self.basis = self.mean.to(scale.device), self.basis.to(scale.device)
        cells = self.basis * scale[:, None] @ whole.flatten(2).float()
        return (cells + self.mean[:, None]).reshape(len(cells), -1, *whole.shape[2:])

    def error(self, value: Tensor, decoded: Tensor) -> Tensor:
        value, decoded = value.float().flatten(2), decoded.float().flatten(2)
        varies = vector_norm(value - value.mean(2, keepdim=True), dim=(1, 2))
        off: Tensor = vector_norm(value - decoded, dim=(1, 2)) / varies.clamp_min(_TINY)
        return off

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis}


def make_codec(name: str, field: str, value: Tensor, temperature: float | None) -> Codec:
    """The codec of a field.

    Args:
        name: the one of the recipe: exact, fp16, int8 or pca.
        field: such as `maps.0`, `logits`, `dense.boxes`.
        value: an example `[B, ...]`.
        temperature: the largest one at which the logits are read, if they are read as softmax alone, which does not
            see the steps of int8; else they are stored as float16, as are a detector's predictions.
    """
    if name == "exact" or not value.is_floating_point():
        return Exact()
    if field == "logits" and name in ("int8", "pca") and temperature is not None and value.ndim in (2, 4):
        return Shifted(temperature)
    return Components() if field.startswith("maps.") and name == "pca" and value.ndim == 4 else Half()


def wider_than(codec: Codec, worst: float) -> Codec:
    """The codec, or a wider one where its worst error on the first batches is above its bound; that of components is
    set by it."""
    if isinstance(codec, Components):
        codec.bound = max(2 * worst, HALF_BOUND) if math.isfinite(worst) else 0.0
        return codec
    if worst <= codec.bound or isinstance(codec, Exact):
        return codec
    wider = Half() if isinstance(codec, Shifted) else Exact()
    said = codec.kind, codec.error_of, worst, codec.bound, wider.kind
    logger.warning("teacher cache: %s would have a %s of %.2g, above %.0g; taken: %s", *said)
    return wider


def codec_from(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codec:
    """The codec that gave these settings and tensors."""
    made: Codec
    if settings["kind"] == Shifted.kind:
        made = Shifted(settings["temperature"])
    elif settings["kind"] == Components.kind:
        made = Components()
        made.mean, made.basis = tensors["mean"], tensors["basis"]
    else:
        made = {Exact.kind: Exact, Half.kind: Half}[settings["kind"]]()
    made.bound = settings["bound"]
    return made


def fields_of(output: TeacherOutput) -> dict[str, Tensor]:
    """The tensors of an output by name: `maps.0`, `logits`, `dense.boxes`."""
    found: dict[str, Tensor] = {}
    for item in fields(output):
        value = getattr(output, item.name)
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        found |= {item.name: value} if isinstance(value, Tensor) else {f"{item.name}.{k}": v for k, v in inner}
    return found


def output_of(found: Mapping[str, Tensor], maps: int) -> TeacherOutput:
    """The output with these fields; maps that were not kept have no values."""
    like = next(iter(found.values()))
    empty = like.new_empty(len(like), 0, 1, 1)
    nested: dict[str, Any] = {"maps": [found.get(f"maps.{index}", empty) for index in range(maps)]}
    for name, value in found.items():
        key, _, inner = name.partition(".")
        if key != "maps":
            nested[key] = {**nested.get(key, {}), inner: value} if inner else value
    return TeacherOutput(**nested)


@dataclass(frozen=True)
class Piece:
    """A part of a field in a row: where its bytes are, and what they are."""

    field: str
    part: str
    dtype: str
    shape: tuple[int, ...]  # of one picture
    start: int  # byte


class Rows:
    """Packs the fields of a batch into a row of bytes for each picture, and back.

    Args:
        codecs: of each field that is kept; others are left out.
    """

    def __init__(self, codecs: Mapping[str, Codec]) -> None:
        self.codecs = dict(codecs)

    @torch.no_grad()
    def pack(self, found: Mapping[str, Tensor]) -> tuple[str, Tensor]:
        """The layout of the rows, as text, and the rows uint8 `[B, R]`, on the device of the fields."""
        pieces: list[Piece] = []
        columns: list[Tensor] = []
        kept = {}
        size = 0
        with _plain(found):
            for name, codec in self.codecs.items():
                value = found[name]
                strides = list(value.stride()) if isinstance(codec, Exact) else []
                kept[name] = [_name(value), list(value.shape[1:]), strides]
                for part, content in codec.encode(value).items():
                    flat = content.contiguous().reshape(len(content), -1).view(torch.uint8)
                    pieces.append(Piece(name, part, _name(content), tuple(content.shape[1:]), size))
                    filled = -flat.shape[1] % _ALIGN
                    columns += [flat, flat.new_zeros(len(flat), filled)]
                    size += flat.shape[1] + filled
        layout = {"fields": kept, "pieces": [list(vars(piece).values()) for piece in pieces]}
        return json.dumps(layout, sort_keys=True), torch.cat(columns, 1)

    @torch.no_grad()
    def unpack(
        self, layout: str, rows: Tensor, wanted: Iterable[str] | None = None, narrow: bool = False
    ) -> dict[str, Tensor]:
        """The fields `[B, ...]` of rows `[B, R]`, in the teacher's dtype, where the rows are.

        With `narrow` in the dtype of the codec where the teacher's holds all its values, for maps of which only a part
        is read.
        """
        kept, pieces = _read(layout)
        wanted_names = list(kept if wanted is None else wanted)
        found: dict[str, Tensor] = {}
        with _plain({"": rows}):
            for name in wanted_names:
                parts = {piece.part: _number(rows, piece) for piece in pieces[name]}
                dtype, shape, stride = kept[name]
                value = self.codecs[name].decode(parts)
                if isinstance(self.codecs[name], Exact):
                    found[name] = _as_given(value, stride)
                else:
                    holds = narrow and torch.promote_types(value.dtype, dtype) == dtype
                    found[name] = value if holds else value.to(dtype)
        return found

    def types(self, layout: str) -> dict[str, torch.dtype]:
        """The teacher's dtype of each field of rows."""
        return {name: dtype for name, (dtype, _, _) in _read(layout)[0].items()}

    def errors(
        self, found: Mapping[str, Tensor], decoded: Mapping[str, Tensor], lossy: bool = False
    ) -> dict[str, Tensor]:
        """The error of each picture by field, `[B]`; nan where a value is not finite.

        Args:
            found: the fields.
            decoded: the same, decoded.
            lossy: leave out those that are stored bit for bit, where they were just decoded.
        """
        kept = {name: one for name, one in self.codecs.items() if not (lossy and isinstance(one, Exact))}
        with _plain(found):
            return {name: codec.error(found[name], decoded[name]) for name, codec in kept.items()}

    def within(self, errors: Mapping[str, Tensor]) -> Tensor:
        """Which pictures are within the bound of every codec, bool `[B]`."""
        return torch.stack([error <= self.codecs[name].bound for name, error in errors.items()]).all(0)


def _plain(found: Mapping[str, Tensor]) -> torch.autocast:
    """Without the Trainer's autocast, which would round what is stored."""
    return torch.autocast(next(iter(found.values())).device.type, enabled=False)


def _number(rows: Tensor, piece: Piece) -> Tensor:
    """The numbers of a piece of rows `[B, R]`, where they lie."""
    dtype = getattr(torch, piece.dtype)
    length = math.prod(piece.shape) * dtype.itemsize
    found = rows[:, piece.start : piece.start + length].view(dtype)
    return found.unflatten(1, piece.shape) if piece.shape else found.squeeze(1)


def _as_given(value: Tensor, stride: list[int]) -> Tensor:
    """The same values with the strides that the teacher gave, as sums may depend on the order in memory."""
    if list(value.stride())[1:] == stride[1:] or not len(value):
        return value.contiguous() if list(value.stride()) != stride else value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


@lru_cache(maxsize=256)
def _read(layout: str) -> tuple[dict[str, tuple[torch.dtype, list[int], list[int]]], dict[str, list[Piece]]]:
    content = json.loads(layout)
    kept = {name: (getattr(torch, dtype), shape, stride) for name, (dtype, shape, stride) in content["fields"].items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in kept}
    for field, part, dtype, shape, start in content["pieces"]:
        pieces[field].append(Piece(field, part, dtype, tuple(shape), start))
    return kept, pieces
