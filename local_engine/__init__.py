"""Processes, ports, GPUs and vLLM's flags, and the engine simulator.

Refuses to know requests.
"""
