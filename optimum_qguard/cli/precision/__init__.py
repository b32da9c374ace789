"""Bits for each layer: where a model needs them, and what they give."""
