"""The provider for CPUs: compiled by Numba."""
