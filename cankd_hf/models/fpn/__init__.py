"""Pyramid students; `configuration_cankd_fpn` and `modeling_cankd_fpn` travel with every checkpoint."""

# The auto classes come first: importing them registers these models (see _autoregister), which must not happen halfway
# through one of the two files.
import transformers.models.auto.modeling_auto  # noqa: F401
