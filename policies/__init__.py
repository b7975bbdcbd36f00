"""Callers, limits, money and placement.

Every decision is a synchronous function over memory. Refuses to know HTTP, asyncio and the clock: time is
passed in.
"""
