"""The proving ground of placement: the gateway's own policies on simulated replicas, on real ones, and beside other routers.

`python -m bench.routing` runs it; README.md says what is measured and how.
"""
