"""vLLM's attention backends with block-table masks; batches without groups stay as they are."""
