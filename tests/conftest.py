"""For all tests: names that are the same in every process, so that they can be run side by side."""


def pytest_make_parametrize_id(config, val, argname):
    """Compressed bytes hold the time they were made at."""
    del config
    return argname if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()) else None
