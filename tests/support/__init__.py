"""Helpers of the tests: networks, graphs, pipelines, and the masked reference with its judges."""
