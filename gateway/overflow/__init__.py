"""The durable queue: what could not be answered at once is run later, exactly once as far as its caller can tell."""
