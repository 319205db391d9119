"""vLLM's attention backends with block-table masks. Batches without groups take the stock kernel."""
