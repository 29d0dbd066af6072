"""Tokens to maps, and maps out of anything."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput

from cankd_hf.errors import InputError
from cankd_hf.features import resize_map, to_maps, tokens_to_map
from cankd_hf.features.grids import infer_grid


@pytest.mark.parametrize(
    ("tokens", "size", "patch", "grid"),
    [
        (197, (224, 224), None, (14, 14)),
        (257, (224, 224), 14, (16, 16)),
        (261, (224, 224), 14, (16, 16)),
        (256, (224, 224), None, (16, 16)),
        (58 * 48, (230, 190), None, (58, 48)),
        (16 * 13 + 5, (230, 190), 14, (16, 13)),
        (200 + 5 + 1600, (640, 640), 16, (40, 40)),
        (56 * 56, (224, 224), 16, (56, 56)),
        (9999, (64, 64), None, None),
    ],
)
def test_infer_grid(tokens: int, size: tuple[int, int], patch: int | None, grid: tuple[int, int] | None) -> None:
    assert infer_grid(tokens, size, patch) == grid


def test_tokens_keep_their_places() -> None:
    patches = torch.arange(6.0).view(1, 6, 1)
    tokens = torch.cat([torch.full((1, 2, 1), -1.0), patches], dim=1)
    assert tokens_to_map(tokens, (2, 3)).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    with pytest.raises(ValueError, match="8 tokens cannot fill a grid of 3 x 3"):
        tokens_to_map(tokens, (3, 3))


def test_every_container() -> None:
    a, b = torch.randn(2, 8, 16, 24), torch.randn(2, 8, 8, 12)
    for output in (
        [a, b],
        (a, (b, torch.ones(2, 8, 12, dtype=torch.bool))),
        OrderedDict({"0": a, "1": b}),
        BackboneOutput(feature_maps=(a, b), hidden_states=(b, b, b)),
        BaseModelOutput(last_hidden_state=[a, b]),
    ):
        found = to_maps(output, (64, 96))
        assert len(found) == 2
        assert torch.equal(found[0], a) and torch.equal(found[1], b)
    assert torch.equal(to_maps(a.permute(0, 2, 3, 1), (64, 96))[0], a), "channels last"
    with pytest.raises(InputError, match=r"got a tensor \[2, 10\]"):
        to_maps(torch.randn(2, 10), (64, 96))


def test_resize_map() -> None:
    x = torch.randn(1, 4, 6, 8)
    assert resize_map(x, (6, 8)) is x
    assert resize_map(x, (12, 5)).shape == (1, 4, 12, 5)
    assert resize_map(x.bfloat16(), (3, 4)).dtype == torch.bfloat16
    assert torch.allclose(resize_map(torch.ones(1, 1, 5, 7), (9, 4)), torch.ones(1, 1, 9, 4))
