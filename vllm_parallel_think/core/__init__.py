"""What decides: grammars, the group state machine, limits. Imports neither torch nor vLLM."""
