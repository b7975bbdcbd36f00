"""Whether this is the compiled build: told to operators and kept beside measurements, never asked on a request.

Which modules are compiled, and how, is setup.py's; the code itself does not know.
"""

from policies import cost


def build_name() -> str:
    """`compiled` where the request path was loaded from a shared library, else `pure Python`."""
    return "pure Python" if (cost.__file__ or "").endswith(".py") else "compiled"
