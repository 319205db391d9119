"""The worker process: vLLM's workers, told of groups."""
