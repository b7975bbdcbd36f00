"""Which endpoint of a pool gets a request.

Pure, synchronous, memory only; time is passed in. The gateway, `headgate explain` and the discrete-event
simulator of `bench/routing` run this very code.
"""
