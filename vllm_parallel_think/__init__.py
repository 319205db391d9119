"""Fork and join inside one vLLM request, as a plugin of stock vLLM.

``vllm_parallel_think.core`` decides (pure Python: grammars, groups, budgets); the modules beside it
translate those decisions to vLLM's scheduler, worker and attention backends.
"""

__version__ = "0.1.0"
