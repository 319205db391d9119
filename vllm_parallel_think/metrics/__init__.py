"""What operators see: ``vllm_pt_`` metrics in vLLM's own ``/metrics``.

``export`` brings values from engine processes to the front end, ``instruments`` defines them,
``recorder`` fills them from groups, ``refusals`` counts in the front end.
"""
