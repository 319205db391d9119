"""The exam: which way of thinking in parallel is worth it, on equal budgets. Knows no vLLM.

Talks HTTP to any OpenAI-compatible server; what only the plugin can do needs a server with it.
"""
