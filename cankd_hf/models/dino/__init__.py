"""DINO; these files travel with every checkpoint."""

# As for the pyramids: see cankd_hf/models/fpn/__init__.py.
import transformers.models.auto.modeling_auto  # noqa: F401
