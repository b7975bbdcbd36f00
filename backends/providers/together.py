"""Together AI. Models are named `<owner>/<model>`."""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="together",
    base_url="https://api.together.ai/v1",
    key_env="TOGETHER_API_KEY",
    base_url_env="TOGETHER_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS),
    prices="together",
    docs="https://docs.together.ai/docs/inference/openai-compatibility",
)
