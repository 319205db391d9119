"""What operators see: ``vllm_pt_`` metrics in vLLM's own ``/metrics``.

``export`` brings values from engine processes to the front end, through ``files`` in ``folders``;
``instruments`` defines them, ``recorder`` fills them from groups, ``refused_requests``
counts in the front end. ``outage`` says once, each way, when something of this fails.
"""
