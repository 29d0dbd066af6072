"""Pyramid students: any `AutoBackbone`, a neck and a head, as one `PreTrainedModel`."""
