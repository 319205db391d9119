"""Attention over a shared prefix: our kernels beside others', in the same run."""
