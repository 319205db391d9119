"""What depends on vLLM's version, and how something of vLLM's is replaced."""
