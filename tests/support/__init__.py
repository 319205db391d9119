"""What tests share: oracles, a simulator, tiny models, servers."""
