"""Questions whose answers can be checked."""
