"""Prompts, pairs of images, the model's own references, and what is kept of them on disk."""
