"""Converted DINO: the authors' and OpenMMLab's, against its forward pass re-derived from the names of the tensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from cankd_hf.convert.command import convert
from cankd_hf.convert.reading import read_checkpoint
from cankd_hf.features.auto_taps import auto_taps

from .naive_dino import DEPTHS, LEVELS, POINTS, NaiveDINO, dino
from .openmmlab import State, saved
from .test_command import run

SIZE = (120, 170)


def converted(file: Path, state: State, labels: str | None = None, **arguments: Any) -> tuple[Any, Any, Any]:
    args = argparse.Namespace(nheads=8, two_stage_type="standard", **arguments)
    torch.save({"model": state, "args": args, "epoch": 11} if arguments else {"state_dict": state}, file)
    made = read_checkpoint(file, "student")
    return *convert(made, "dino", "auto", labels), made


@pytest.mark.parametrize(("kind", "shared"), [("authors", True), ("authors", False), ("openmmlab", False)])
def test_forward(kind: str, shared: bool, tmp_path: Path) -> None:
    state = dino(kind, 3, shared)
    arguments = {"dn_number": 40, "pe_temperatureH": 20, "pe_temperatureW": 20} if kind == "authors" else {}
    model, plan, made = converted(tmp_path / "m.pth", state, **arguments)
    config = model.config
    assert (config.share_heads, config.num_feature_levels, config.decoder_n_points) == (shared, LEVELS, POINTS)
    assert {part: getattr(config, f"{part}_layers") for part in DEPTHS} == DEPTHS
    assert config.num_denoising == (40 if kind == "authors" else 100) and config.num_labels == 3
    again = sum(name.startswith("transformer.decoder.") and "_embed." in name for name in state)
    assert len(made.left_out.get("heads named twice", [])) == again == (24 if kind == "authors" else 0)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    memory, logits, boxes = NaiveDINO(kind, state)(image)
    with torch.no_grad():
        output = model(image)
    torch.testing.assert_close(output.encoder_last_hidden_state[0], memory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits[0], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.intermediate_reference_points[0], boxes, rtol=1e-4, atol=1e-5)
    assert logits.std() > 0.1 and boxes.std() > 0.1
    torch.testing.assert_close(model.model.label_embed.weight, _labels(kind, state)[:3])


@pytest.mark.parametrize("kind", ["authors", "openmmlab"])
def test_swin(kind: str, tmp_path: Path) -> None:
    state = dino(kind, 3, swins=True)
    model, plan, made = converted(tmp_path / "m.pth", state)
    assert "swin of [1, 1, 1, 1] blocks, 32 channels, windows of 3" in plan.notes[0]
    assert len(made.left_out["tables of places, made anew"]) == 4
    assert not any("patch_embed" in name for names in made.left_out.values() for name in names)
    backbone = model.model.backbone
    block = backbone.swin.encoder.layers[1].blocks[0].attention
    stage, attention = ("layers", "attn") if kind == "authors" else ("stages", "attn.w_msa")
    root = "backbone.0." if kind == "authors" else "backbone."
    joined = state[f"{root}{stage}.1.blocks.0.{attention}.qkv.weight"]
    assert torch.equal(torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight]), joined)
    # Four cells become one.
    x = torch.randn(1, 6, 8, 32, generator=torch.Generator().manual_seed(0))
    if kind == "authors":  # Microsoft's: the rows of a column first
        together = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)
    else:  # OpenMMLab's: torch.nn.Unfold
        together = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    name = f"{root}{stage}.0.downsample"
    normed = F.layer_norm(together, [128], state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    wanted = F.linear(normed, state[f"{name}.reduction.weight"])
    with torch.no_grad():
        found = backbone.swin.encoder.layers[0].downsample(x.flatten(1, 2), (6, 8))
        maps = model(torch.randn(1, 3, *SIZE)).encoder_last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(maps).all()


def _labels(kind: str, state: State) -> torch.Tensor:
    return state["label_enc.weight" if kind == "authors" else "dn_query_generator.label_embedding.weight"]


def test_folder_of_coco_rows(tmp_path: Path, capsys: Any) -> None:
    """The authors' heads for COCO have 91 rows; those of its 80 categories stay, unless names are given for all."""
    state = dino("authors", 91, True)
    file = tmp_path / "checkpoint0011_4scale.pth"
    torch.save({"model": state, "args": argparse.Namespace(dn_box_noise_scale=0.4)}, file)
    assert run(file, "dino", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "of 91 rows those 80 with a category of COCO" in said and "DINO of its authors" in said
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "a")
    assert model.config.id2label[0] == "person" and model.config.id2label[79] == "toothbrush"
    assert model.config.box_noise_scale == 0.4
    assert torch.equal(model.class_embed[0].weight[0], state["class_embed.0.weight"][1])
    assert torch.equal(model.encoder_class_embed.weight[79], state["transformer.enc_out_class_embed.weight"][90])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "a")
    assert processor.size["shortest_edge"] == 800 and processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}]
    loss = model.train()(torch.randn(1, 3, 128, 192), labels=labels).loss
    assert torch.isfinite(loss) and auto_taps(model)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"c{i}" for i in range(91)))
    assert run(file, "dino", tmp_path / "b", "--labels", str(names)) == 0
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "b").config.num_labels == 91


def test_refused(tmp_path: Path, capsys: Any) -> None:
    state = dino("authors", 3, True)
    other = {**state, "transformer.decoder.class_embed.1.bias": torch.ones(3)}
    patterns = {**state, "transformer.patterns.weight": torch.ones(2, 32)}
    other_backbone = {name: x for name, x in state.items() if not name.startswith("backbone.")}
    other_backbone["backbone.0.downsample_layers.0.0.weight"] = torch.ones(1)  # ConvNeXt
    absolute = {**dino("authors", 3, True, swins=True), "backbone.0.absolute_pos_embed": torch.ones(1)}
    cases: list[tuple[State, dict[str, Any], str]] = [
        (other, {}, "to equal class_embed.1.bias"),
        (patterns, {}, "unknown: transformer.patterns.weight"),
        (other_backbone, {}, "expected a ResNet or ResNeXt backbone"),
        (absolute, {}, "expected a Swin transformer (V1) with relative places"),
        (state, {"decoder_sa_type": "ca_label"}, "expected decoder_sa_type sa"),
        (state, {"pe_temperatureH": 20, "pe_temperatureW": 30}, "temperatures"),
        (state, {"nheads": 7}, "expected 7 heads"),
    ]
    for place, (given, arguments, words) in enumerate(cases):
        file = tmp_path / f"{place}.pth"
        torch.save({"model": given, "args": argparse.Namespace(**arguments)}, file)
        assert run(file, "dino", tmp_path / "out") == 2
        assert words in capsys.readouterr().err, words
    assert not (tmp_path / "out").exists()
    assert run(saved(tmp_path / "n.pth", dino("openmmlab", 3)), "retinanet", tmp_path / "out") == 2
