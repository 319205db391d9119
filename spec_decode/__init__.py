"""Lossy verification of draft tokens: rules, the judge head and its training. Knows no vLLM."""
