"""Hogwild! Inference (arXiv 2504.06261): writers of one model that see each other write.

Users call them workers: in profiles, options and summaries. Here that word is vLLM's.
"""
