"""Stores of a teacher's answers: codecs, files, processes that are killed, that write at once, or find no disk."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.teachers import store_files
from cankd_hf.teachers.codecs import Codec, Components, Rows, codec_from, fields_of, make_codec, output_of, wider_than
from cankd_hf.teachers.store import Damaged, Seen, Store, create_store
from cankd_hf.teachers.teacher import TeacherOutput

HEADER = {"identity": {"a": 1}, "codecs": {"maps.0": {"kind": "fp16"}}, "row_bytes": 64, "seconds": 0.1, "machine": {}}
HEADER |= {"machine": {"torch": "2"}}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def row(number: int) -> Tensor:
    return torch.full((64,), number % 251, dtype=torch.uint8)


def add(store: Store, *numbers: int) -> None:
    seen = [Seen(number, 0, 8, 8) for number in numbers]
    store.add("layout", [key(n) for n in numbers], torch.stack([row(n) for n in numbers]), seen, {"cpu_seconds": 1.0})
    store.flush()


def stored(store: Store, count: int) -> list[int]:
    """Numbers below `count` whose rows are there, after a look at each row."""
    refs = store.find([key(number) for number in range(count)])
    found = [number for number, ref in enumerate(refs) if ref is not None]
    rows = store.read([ref for ref in refs if ref is not None]) if found else []
    assert all(torch.equal(one, row(number)) for number, one in zip(found, rows, strict=True))
    return found


def again(store: Store) -> Store:
    header = store_files.read_header(store.folder)
    assert header is not None
    return Store(store.folder, header)


def output(**changes: Any) -> TeacherOutput:
    """Maps with more in some channels than in others, logits as of a trained head, and a detector's predictions."""
    maps = [torch.randn(3, 48, 6, 5) * torch.logspace(1, -2, 48)[:, None, None], torch.randn(3, 8, 3, 3)]
    dense = {"class_logits": torch.randn(3, 20, 4), "boxes": torch.rand(3, 20, 4), "levels": torch.arange(3)}
    return TeacherOutput(maps, 6 * torch.randn(3, 19, 12, 10), dense, **changes)


def rows_of(name: str, found: dict[str, Tensor], temperature: float | None) -> tuple[Rows, dict[str, Codec]]:
    codecs = {field: make_codec(name, field, value, temperature) for field, value in found.items()}
    for field, codec in codecs.items():
        codec.settle(found[field])
    rows = Rows(codecs)
    errors = rows.errors(found, rows.unpack(*rows.pack(found)))
    codecs = {field: wider_than(codec, float(errors[field].max())) for field, codec in codecs.items()}
    return Rows(codecs), codecs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", ["exact", "fp16", "int8", "pca"])
def test_each_codec_keeps_its_bound(name: str, temperature: float, dtype: torch.dtype) -> None:
    found = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fields_of(output()).items()}
    rows, codecs = rows_of(name, found, temperature)
    layout, packed = rows.pack(found)
    decoded = rows.unpack(layout, packed)
    assert all(
        decoded[field].dtype == value.dtype and decoded[field].shape == value.shape for field, value in found.items()
    )
    errors = rows.errors(found, decoded)
    assert bool(rows.within(errors).all()), errors
    assert codecs["dense.levels"].kind == "exact" and codecs["dense.class_logits"].kind in ("exact", "fp16")
    if name == "exact":
        assert all(torch.equal(decoded[field], value) for field, value in found.items())
    if name in ("int8", "pca") and dtype == torch.float32:
        assert codecs["logits"].kind == "int8" and float(errors["logits"].max()) < 1e-3
        p, q = ((x / temperature).log_softmax(1) for x in (found["logits"], decoded["logits"]))
        assert float((p.exp() * (p - q)).sum(1).mean()) < 1e-3
        constant = rows.unpack(*rows.pack({**found, "logits": found["logits"] + 7}))["logits"]
        assert abs(float((constant - decoded["logits"]).mean()) - 7) < 0.01, "the level of the logits is kept"
    if name == "pca":
        assert codecs["maps.0"].kind == "pca"
        same = codec_from(codecs["maps.0"].settings(), codecs["maps.0"].tensors())
        assert torch.equal(same.decode(codecs["maps.0"].encode(found["maps.0"])).to(dtype), decoded["maps.0"])
    made = output_of(decoded, 2)
    assert made.dense is not None and set(made.dense) == {"class_logits", "boxes", "levels"} and len(made.maps) == 2


def test_logits_that_are_not_read_as_a_softmax_are_no_bytes() -> None:
    assert make_codec("int8", "logits", torch.randn(2, 3, 4, 4), None).kind == "fp16"
    assert make_codec("int8", "logits", torch.randn(2, 30, 4), 1.0).kind == "fp16", "queries have no softmax of pixels"


def test_exact_keeps_the_order_in_memory() -> None:
    tokens = torch.randn(3, 31, 8)[:, 1:].unflatten(1, (6, 5)).permute(0, 3, 1, 2)  # as of a ViT without its CLS token
    found = {"maps.0": tokens, "logits": torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last)}
    rows, _ = rows_of("exact", found, 1.0)
    decoded = rows.unpack(*rows.pack(found))
    for name, value in found.items():
        assert decoded[name].stride() == value.stride() and torch.equal(decoded[name], value)


def test_what_does_not_fit_a_codec_is_out_of_its_bound() -> None:
    codec = Components()
    fit = torch.randn(4, 300, 4, 4) * torch.logspace(1, -3, 300)[:, None, None]
    codec.settle(fit)
    wider_than(codec, float(codec.error(fit, codec.decode(codec.encode(fit))).max()))
    other = fit.flip(1)
    assert float(codec.error(other, codec.decode(codec.encode(other))).min()) > codec.bound
    large = torch.full((1, 2), 1e6)
    half = Rows({"x": make_codec("fp16", "x", large, None)})
    assert not half.within(half.errors({"x": large}, half.unpack(*half.pack({"x": large})))).any(), (
        "inf is never stored"
    )


def test_rows_are_found_by_other_processes_and_later(tmp_path: Path) -> None:
    one = create_store(tmp_path / "s", HEADER, {"maps.0:mean": torch.ones(3)})
    other = create_store(tmp_path / "s", {**HEADER, "row_bytes": 1}, {"maps.0:mean": torch.zeros(3)})
    assert other.header["row_bytes"] == 64 and torch.equal(other.fitted["maps.0:mean"], torch.ones(3)), (
        "the first wins"
    )
    assert len(list((tmp_path / "s").glob("codec-*"))) == 1
    add(one, 0, 1)
    add(other, 2)
    assert stored(one, 4) == [0, 1, 2] == stored(other, 4) == stored(again(one), 4)
    assert one.charged() == {"cpu_seconds": 1.0}, "the row of the other one; its own are paid"
    assert again(one).charged() == {} and again(one).spent() == {"cpu_seconds": 2.0}
    resumed = Store(one.folder, one.header, paid={one.writer: 1})
    stored(resumed, 4)
    assert resumed.charged() == {"cpu_seconds": 1.0}, "files that this run wrote before are paid too"


def fork(work: Any) -> int:
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(0)
    return process


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Writers that are killed leave whole files or none, and others go on."""
    store = create_store(tmp_path / "s", HEADER, {})

    def write(start: int) -> None:
        own = again(store)
        for number in range(start, 10_000):
            add(own, number)

    for trial in range(6):
        process = fork(lambda start=1000 * trial: write(start))
        deadline = time.monotonic() + 20
        while len(list(store.folder.glob("[0-9a-f]*-*.safetensors"))) < 3 * trial + 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.001 * trial)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    found = stored(again(store), 7000)
    assert len(found) >= 12
    last = again(store)
    add(last, 9999)
    assert stored(again(store), 10_000)[-1] == 9999
    for leftover in store.folder.glob(".partial-*"):
        os.utime(leftover, (0, 0))
    store_files.clean(store.folder)
    assert not list(store.folder.glob(".partial-*"))


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    def write(start: int) -> None:
        own = create_store(tmp_path / "s", HEADER, {"f:basis": torch.full((4,), float(start))})
        for number in range(start, start + 30):
            add(own, number)

    for process in [fork(lambda start=start: write(start)) for start in (0, 20)]:
        os.waitpid(process, 0)
    header = store_files.read_header(tmp_path / "s")
    assert header is not None
    assert stored(Store(tmp_path / "s", header), 60) == list(range(50))


def test_a_file_that_another_process_has_just_renamed_stops_no_reader(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", HEADER, {})
    add(store, 0, 1)
    for name in (f"{store_files.ASIDE}0123-00000.safetensors", f"{store_files.ASIDE}0123.json"):
        (store.folder / name).symlink_to("gone")  # listed, and not there any more when it is looked at
    reader = again(store)
    add(store, 2)
    assert stored(reader, 4) == [0, 1, 2]
    assert reader.size > 3 * 64


class Harm(NamedTuple):
    """What happened to a file: from which byte on, and what is said of it."""

    said: str
    cut: bool


@pytest.mark.parametrize("harm", [Harm("is not whole", True), Harm("", False)])
def test_a_torn_file_is_left_out_and_a_changed_row_computed_again(
    harm: Harm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = create_store(tmp_path / "s", HEADER, {})
    add(store, 0, 1)
    add(store, 2)
    file = store.folder / f"{store.writer}-00000.safetensors"
    content = bytearray(file.read_bytes())
    place = content.index(bytes(row(1).tolist()))
    content[place] ^= 255
    file.write_bytes(content[:place] if harm.cut else content)
    reread = again(store)
    assert harm.said in caplog.text
    refs = reread.find([key(0), key(1), key(2)])
    if harm.cut:
        assert [ref is None for ref in refs] == [True, True, False]
    else:
        with pytest.raises(Damaged, match="not what was written"):
            reread.read([ref for ref in refs if ref is not None])
        assert stored(reread, 3) == [0, 2]
    add(reread, 1)
    assert 1 in stored(reread, 3)
    later = again(store)
    with suppress(Damaged):  # the first copy, if it is found first
        stored(later, 3)
    assert 1 in stored(later, 3), "another process finds the second copy"


def test_a_full_disk_is_told_before_and_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    store = create_store(tmp_path / "s", HEADER, {})
    add(store, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=store_files.MARGIN + 100))
    with pytest.raises(InputError, match="teacher.cache.folder: .* needs 0.00 GB .* fewer views"):
        store_files.check_free(tmp_path, 101)
    add(store, 1, 2)
    add(store, 3)
    assert caplog.text.count("nothing more is stored") == 1
    assert stored(store, 4) == [0] == stored(again(store), 4)


def test_a_store_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", HEADER, {})
    (store.folder / "header.json").write_text("{")
    with pytest.raises(InputError, match="expected a store of answers"):
        store_files.read_header(store.folder)
