"""Limits and budgets: what they are, how they are counted, and the policy that holds them.

Pure: no HTTP, no asyncio, no clock. Stores and the keeping of leases are in `gateway`.
"""
