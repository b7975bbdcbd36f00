"""One file per endpoint of the data plane; routes.py lists them."""
