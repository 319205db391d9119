"""Requests that fork into paths and join again."""
