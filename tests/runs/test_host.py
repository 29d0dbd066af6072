"""What a command chooses by itself: threads by the cores that are left, settings by the device."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cankd_hf import host as host_module
from cankd_hf.config.recipe import Recipe
from cankd_hf.host import Host, Load, cgroup_quota, read_host, usable_cores, wait_passively
from cankd_hf.json_text import to_json
from cankd_hf.names import ARM_FILE, THREADS_FILE
from cankd_hf.runs import device as device_module
from cankd_hf.runs.build import training_args
from cankd_hf.runs.device import Device, choices, told
from cankd_hf.runs.folder import threads_of
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.runs.threads import choose_threads, settle_threads
from cankd_hf.teachers.teacher import auto_dtype
from cankd_hf.training.contention import BusyCoresCallback


@pytest.mark.parametrize(
    ("host", "workers", "threads"),
    [
        (Host(2), 0, 2),
        (Host(2, others=0.3), 0, 2),  # a browser
        (Host(2, others=1.0), 0, 1),
        (Host(2, others=2.0), 0, 1),  # at least one
        (Host(64, others=30.2), 0, 34),
        (Host(64), 8, 56),
        (Host(2), 2, 1),
        (Host(4), 8, 2),  # loading processes get half at most
        (Host(1), 4, 1),
        (Host(16, processes=4), 0, 4),
        (Host(2, processes=4), 0, 1),
    ],
)
def test_each_thread_finds_a_core(host: Host, workers: int, threads: int) -> None:
    assert host.threads(workers) == threads
    assert choose_threads(host, 999, workers=workers)[0] == threads
    assert choose_threads(host, 1, workers=workers)[0] == 1, "torch's own number is never exceeded"


def test_what_the_user_set_wins_and_is_named() -> None:
    busy = {"cores": 2, "others": 2.0}
    assert choose_threads(Host(**busy, asked="OMP_NUM_THREADS=2"), 2) == (2, "threads: 2 (OMP_NUM_THREADS=2)")
    assert choose_threads(Host(**busy, asked="MKL_NUM_THREADS=2"), 2, began=1)[0] == 2
    found = read_host({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"})
    assert found.asked == "OMP_NUM_THREADS=1, which torchrun sets where nobody else does"
    assert read_host({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}).asked == "OMP_NUM_THREADS=3"
    launched = read_host({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}).asked
    assert launched is not None and "accelerate launch" in launched
    for ignored in ("", "0", "-1", "two", "1.5"):  # by OpenMP, which takes all cores
        assert read_host({"OMP_NUM_THREADS": ignored}, seconds=0.0).asked is None
    assert read_host({"OMP_NUM_THREADS": "2,1", "MKL_NUM_THREADS": "4"}).asked == "OMP_NUM_THREADS=2,1"
    assert read_host({"LOCAL_WORLD_SIZE": "0"}, seconds=0.0).processes == 1
    assert read_host({"LOCAL_WORLD_SIZE": "4"}).processes == 4


def test_the_line_says_what_and_why() -> None:
    fix = "; OMP_NUM_THREADS sets another number)"
    assert choose_threads(Host(2), 2)[1] == f"threads: 2 (2 usable cores, free{fix}"
    assert choose_threads(Host(2, 1.9), 2)[1] == f"threads: 1 (2 usable cores, 1.9 in use by other programs{fix}"
    assert (
        choose_threads(Host(8), 8, workers=2)[1] == f"threads: 6 (8 usable cores, free beside 2 loading processes{fix}"
    )
    assert choose_threads(Host(8, processes=2), 8)[1] == f"threads: 4 (8 usable cores for 2 processes{fix}"


def test_a_run_goes_on_with_the_number_it_began_with(tmp_path: Path) -> None:
    busy, before = Host(2, others=2.0), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        (tmp_path / THREADS_FILE).write_text(to_json({"threads": 2}))
        assert settle_threads(busy, tmp_path).startswith("threads: 1 ("), "nothing is trained yet"
        torch.set_num_threads(2)
        (tmp_path / ARM_FILE).write_text("{}")
        assert settle_threads(busy, tmp_path).startswith("threads: 2, as this run began (2 usable cores, 2.0 in use")
        assert torch.get_num_threads() == 2
        assert settle_threads(busy).startswith("threads: 1 (") and torch.get_num_threads() == 1
        (tmp_path / THREADS_FILE).write_text(to_json({"threads": 64}))
        assert settle_threads(busy, tmp_path).startswith("threads: 1 ("), "this machine has no 64 cores"
        for no_number in (0, -1, True, "2", None):
            (tmp_path / THREADS_FILE).write_text(to_json({"threads": no_number}))
            assert threads_of(tmp_path) is None
    finally:
        torch.set_num_threads(before)


def test_threads_sleep_in_barriers_only_where_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    for idle in (Host(2), Host(2, 2.0, waits="GOMP_SPINCOUNT=5"), Host(8, processes=2)):
        assert not wait_passively(idle)
    assert os.environ["OMP_WAIT_POLICY"] == ""
    assert wait_passively(Host(2, 2.0)) and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert not wait_passively(Host(2, 2.0)), "OpenMP has read it already"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"user/job/cpu.max": "max 100000\n", "user/cpu.max": "300000 100000\n"}, 3.0),
    ],
)
def test_quotas_of_control_groups_are_read(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/job\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert cgroup_quota(tmp_path) == quota
    assert 1 <= usable_cores(tmp_path) <= quota


def test_only_what_others_use_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own work, that of children and what runs at lower priority are no reason to take fewer threads."""
    clock = {"now": 0.0, "all": 0.0, "nice": 0.0, "own": 0.0}
    times = lambda **_: [SimpleNamespace(user=clock["all"], system=0.0, nice=clock["nice"], idle=0.0)]  # noqa: E731
    monkeypatch.setattr(host_module.psutil, "cpu_times", times)
    monkeypatch.setattr(host_module, "_affinity", lambda: {0})
    monkeypatch.setattr(host_module, "family_seconds", lambda: clock["own"])
    monkeypatch.setattr(host_module.time, "perf_counter", lambda: clock["now"])
    load = Load()
    clock.update(now=2.0, all=1.9, own=1.5, nice=9.0)
    assert load.others(1) == pytest.approx(0.2)
    clock.update(now=3.0, all=2.9, own=1.5)
    assert load.others(1) == pytest.approx(1.0)


def test_the_trainer_warns_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = sys.modules[BusyCoresCallback.__module__]
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(Load, "age", lambda self: 9.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("a notebook's number was changed"))
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    said = lambda: [record.message for record in caplog.records if "threads" in record.message]  # noqa: E731
    watcher = BusyCoresCallback()
    for use, lines in ((0.2, 0), (1.0, 1), (1.0, 1)):
        monkeypatch.setattr(Load, "others", lambda self, cores, use=use: use)
        if not said():
            watcher.on_train_begin(args, None, None)  # type: ignore[arg-type]
        watcher.on_log(args, None, None)  # type: ignore[arg-type]
        assert len(said()) == lines
    assert "torch.set_num_threads(1)" in said()[0]
    caplog.clear()
    watcher.on_train_begin(SimpleNamespace(device=torch.device("cuda")), None, None)  # type: ignore[arg-type]
    watcher.on_log(args, None, None)  # type: ignore[arg-type]
    assert not said()


# Devices

CUDA, CPU, MPS = Device("cuda"), Device("cpu"), Device("mps")


def test_a_device_chooses_what_suits_it() -> None:
    with_workers = {"dataloader_num_workers": 2}
    assert choices(CUDA, with_workers) == {
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": True,
        "channels_last": True,
        "optim": "adamw_torch_fused",
        "accelerator_config": {"non_blocking": True},
    }
    modern = Device("cuda", tf32=True)
    assert [choices(modern, given).get("tf32") for given in ({}, {"bf16": True}, {"fp16": True})] == [None, True, True]
    assert "tf32" not in choices(modern, {"bf16": True, "tf32": False}) and "tf32" not in choices(CUDA, {"bf16": True})
    quiet = {"dataloader_pin_memory": False, "optim": "adamw_torch_fused"}
    assert choices(CPU, {}) == {**quiet, "channels_last": False}
    assert choices(CPU, {"bf16": True}) == {**quiet, "channels_last": True}
    assert choices(Device("cpu", sharded=True), {"bf16": True})["channels_last"] is False
    assert choices(MPS, with_workers) == {**quiet, "channels_last": False, "dataloader_persistent_workers": True}
    assert choices(Device("cuda", sharded=True), {})["channels_last"] is False, "FSDP2 takes contiguous weights only"


def test_the_recipe_always_wins() -> None:
    given = {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": False,
        "dataloader_pin_memory": False,
        "channels_last": False,
        "optim": "sgd",
    }
    assert choices(CUDA, given) == {}
    assert choices(CUDA, {"accelerator_config": {"non_blocking": False}}).keys().isdisjoint({"accelerator_config"})
    merged = choices(CUDA, {"accelerator_config": {"even_batches": False}})["accelerator_config"]
    assert merged == {"even_batches": False, "non_blocking": True}
    assert "accelerator_config" not in choices(CUDA, {"accelerator_config": "a_file.json"})


RECIPE = """
output_dir: runs/x
data: {path: shapes}
student: {backbone: {model_type: resnet, hidden_sizes: [8, 8, 8, 8], depths: [1, 1, 1, 1], embedding_size: 8}}
teacher: {config: {model_type: dinov2, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}}
training: {optim: sgd}
"""


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, overrides)


def test_the_arguments_of_an_arm_are_those_of_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = training_args(recipe(), tmp_path)
    assert (args.channels_last, args.dataloader_pin_memory, args.optim) == (False, False, "sgd")
    assert training_args(recipe("training.bf16=true"), tmp_path).channels_last
    assert not training_args(recipe("training.bf16=true", "training.channels_last=false"), tmp_path).channels_last
    many = training_args(recipe("training.dataloader_num_workers=1"), tmp_path)
    assert many.dataloader_persistent_workers and not args.dataloader_persistent_workers
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(device_module, "is_torch_tf32_available", lambda: False)
    assert device_module.device_of({}) == CUDA and device_module.device_of({"use_cpu": True}) == CPU
    assert device_module.device_of({"fsdp": True}).sharded
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_module.device_of({}) == CPU


def test_the_device_line_names_choices_and_what_the_recipe_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(CPU, recipe()) == (
        "device: cpu (chosen: dataloader_pin_memory=false, channels_last=false, teacher.dtype=float32; "
        "the recipe sets optim=sgd)"
    )
    monkeypatch.setattr(device_module, "cpu_bf16", lambda: False)
    assert told(CPU, recipe("training.bf16=true")).splitlines()[1:] == [
        "bf16: this CPU has no instructions for it, and computes faster without; set training.bf16=false"
    ]
    assert told(CPU, recipe("teacher.dtype=bfloat16")).endswith("faster without; set teacher.dtype=float32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # accelerate launch --mixed_precision bf16
    assert told(CPU, recipe()).endswith("faster without; set --mixed_precision no of accelerate launch")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "\n" not in told(CPU, recipe()) + told(CUDA, recipe("training.bf16=true"))
    monkeypatch.setattr(device_module, "cpu_bf16", lambda: True)
    assert "\n" not in told(CPU, recipe("training.bf16=true"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    auto_dtype.cache_clear()
    try:
        line = told(CUDA, parse_recipe(RECIPE.replace("{optim: sgd}", "{}"), ["teacher=null"]))
        assert line.endswith("optim=adamw_torch_fused, accelerator_config.non_blocking=true)")
        assert "teacher.dtype=bfloat16" in told(CUDA, recipe())
        assert "teacher.dtype" not in told(CUDA, recipe("teacher.dtype=float16"))
    finally:
        auto_dtype.cache_clear()


def test_recipes_leave_to_the_device_what_it_chooses(repo_root: Path) -> None:
    from cankd_hf.config.reading import read_saved

    for file in sorted((repo_root / "recipes").glob("*.yaml")):
        set_there = read_saved(file)["training"].keys() & (
            choices(CUDA, {"dataloader_num_workers": 1}).keys() - {"optim"}
        )
        assert not set_there, f"{file.name}: {set_there}"
        assert not read_saved(file)["training"].get("optim", "sgd").startswith("adamw"), file.name


FREES = """
import resource, sys
from cankd_hf.host import keep_memory
import torch
kept = keep_memory() if sys.argv[1] == "kept" else False
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(12_000_000)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    """Tensors of 48 MB, made and freed: without it the system makes each of their pages anew."""
    environ = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}

    def faults(kind: str, **more: str) -> tuple[int, int]:
        command = [sys.executable, "-c", FREES, kind]
        done = subprocess.run(command, env={**environ, **more}, capture_output=True, text=True, check=True)
        kept, count = map(int, done.stdout.split())
        return kept, count

    (kept, few), (plain, many) = faults("kept"), faults("plain")
    assert (kept, plain) == (1, 0) and 2 * few < many
    assert faults("kept", MALLOC_ARENA_MAX="2")[0] == 0, "what the user sets is left alone"
