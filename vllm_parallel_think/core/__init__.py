"""What decides: grammars, the group state machine and its limits. Imports neither torch nor vLLM."""
