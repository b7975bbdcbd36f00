"""Finding the endpoints of a pool: by name, in a file, from Kubernetes.

Knows how each source is asked and what its answers mean. Refuses to know when, and what follows from a change: that is
`gateway.discovering`.
"""
