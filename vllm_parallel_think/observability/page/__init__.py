"""A page that shows recent requests as they branch and join.

The engine writes small files beside its metrics (``timelines``); the front end serves them with one
HTML page (``endpoint``). Both only if ``VLLM_PLUGINS`` names ``parallel_think_page``: the page is
not behind the API key, and titles of paths are words of the answers.
"""

PLUGIN = "parallel_think_page"
"""What ``VLLM_PLUGINS`` must name."""
