"""HTTP, asyncio and the order of the stages of a request.

Refuses to know any provider by name, and any price.
"""
