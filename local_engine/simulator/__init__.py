"""An engine simulator: vLLM's HTTP surface over a real prefix cache and a modelled clock, and no model.

Owns a process of its own (`python -m local_engine.simulator`) that answers like a vLLM server, so that routing,
billing and failure handling can be tried without a GPU. It says that it is a simulator in every text it writes,
in `system_fingerprint` and in `/version`. Refuses to know the gateway.
"""

from typing import Final

VERSION: Final = "0.1.0"
FINGERPRINT: Final = f"headgate-simulator-{VERSION}"
