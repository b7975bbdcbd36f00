"""NVIDIA's hosted NIMs. Each model has a closed request schema (`Validation: Unsupported parameter(s): ...`).

Single models have been seen to hang on `stream_options` (HKUDS/DeepTutor#420): set `may_ask_usage: false` for
those, and the cost of their streams is an estimate.
"""

from backends.dialect import CHAT, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="nvidia",
    base_url="https://integrate.api.nvidia.com/v1",
    key_env="NVIDIA_API_KEY",
    base_url_env="NVIDIA_BASE_URL",
    paths=paths(CHAT, EMBEDDINGS),
    # anomalyco/opencode#49240, tingly-dev/tingly-box#1548
    drops=frozenset(
        {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier"}
    ),
    docs="https://docs.api.nvidia.com/nim/reference/llm-apis",
)
