"""Hogwild! Inference (arXiv 2504.06261): workers of one model that see each other write."""
