"""What every test relies on: no network, fixed seeds, and tiny random models made from configs.

The environment is set before torch or huggingface_hub are imported, which read it once.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
_HF_HOME = None
if "HF_HOME" not in os.environ:
    _HF_HOME = tempfile.TemporaryDirectory(prefix="cankd-hf-home-")
    os.environ["HF_HOME"] = _HF_HOME.name

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the generators in use; a test that never imported torch does not pay for it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Keeps what was imported out of garbage collections: each training asks for one, which else looks at a million
    objects of libraries and takes longer than the training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout: recipes/, docs/ and cankd_hf/ lie in it."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real and odd test images; tests that need it skip where it is absent.

    Set CANKD_SHARED to a folder with `data/camvid` and `data/odd_inputs`; the default is `../shared`.
    """
    root = Path(os.environ.get("CANKD_SHARED", ROOT.parent / "shared")) / "data"
    if not root.is_dir():
        pytest.skip(f"no test images at {root}; set CANKD_SHARED")
    return root


@pytest.fixture
def tiny_configs() -> dict[str, dict]:
    """Keyword arguments of tiny configs by family, for `backbone:` / `config:` keys: built in milliseconds."""
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    return {
        "resnet": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_indices": [1, 2, 3, 4],
        },
        "convnext": {
            "model_type": "convnext",
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "out_indices": [1, 2, 3, 4],
        },
        "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, **vit},
        "dinov2_with_registers": {
            "model_type": "dinov2_with_registers",
            "mlp_ratio": 2,
            "num_register_tokens": 2,
            **vit,
        },
    }
