"""Upstream wire formats and connections.

Knows how each provider is spoken to and how bytes reach it. Refuses to know who is asking or what it costs.
"""
