"""Lossy verification of draft tokens in vLLM's runners: the server's key ``judge``."""
