"""Benchmarks, peers, the cost model and the studies."""
