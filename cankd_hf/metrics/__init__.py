"""Scores that are exact for any number of processes and never keep logits."""
