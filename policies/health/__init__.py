"""Which endpoints may be chosen: what is learned from attempts and probes, and how long it is held against them.

Pure, synchronous, memory only; time is passed in. The gateway and the simulator of `bench/routing` run this code.
"""
