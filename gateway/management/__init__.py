"""The management plane: operator credentials only, on its own listener (aiohttp)."""
