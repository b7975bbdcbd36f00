"""What the operator says about engines that Headgate itself runs: the `simulator` block of a pool.

Owns `Section`, the shape of every block of the configuration file: immutable, unknown keys refused, no input in
its errors (it may be a secret); and `Secret`, which shows itself only in `model_dump` with the context
`{"reveal": True}`. Refuses to know files, environment variables and the rest of the configuration.
"""

from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    SerializationInfo,
    model_validator,
)

# Marks a setting that a running Headgate keeps until it is restarted; the reference page and the reload read it.
RESTART: Final[dict[str, Any]] = {"x-needs-restart": True}


def _dump_secret(value: SecretStr, info: SerializationInfo) -> str:
    if info.context and info.context.get("reveal"):
        return value.get_secret_value()
    return str(value)  # asterisks, or nothing if there is nothing to hide


Secret = Annotated[SecretStr, PlainSerializer(_dump_secret)]


class Section(BaseModel):
    """A block of the configuration file. Docstrings under fields become the reference page."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
    )


class SimulatorConfig(Section):
    """Replicas of the engine simulator, each a process of its own on a port of its own. Times are model time."""

    replicas: int = Field(default=1, ge=1, le=64)
    """How many engines."""
    model: str = Field(default="demo", min_length=1)
    """The name the engines serve; targets refer to it."""
    seed: int = Field(default=0, ge=0)
    """Same seed and same requests: same answers. Replica n adds n."""
    time_scale: float = Field(default=1.0, ge=0)
    """Model time x this = real time: 0.1 is ten times faster, 0 answers at once."""
    block_size: int = Field(default=16, ge=1)
    """Tokens in one block of the prefix cache."""
    num_blocks: int = Field(default=8192, ge=1)
    """Blocks of memory; what is not in use keeps prefixes, oldest out first."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Sequences that run at once; others wait."""
    max_num_queued_reqs: int | None = Field(default=None, ge=0)
    """Sequences that may wait before the engine answers 503; null: any number."""
    max_num_queued_tokens: int | None = Field(default=None, ge=0)
    """The same, for the tokens of their prompts."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Tokens computed in one step."""
    max_model_len: int = Field(default=32768, ge=1)
    """Longest prompt plus answer, in tokens."""
    prefill_overhead_us: float = Field(default=20_000.0, ge=0)
    """Time of a step that computes prompt tokens, before the first of them."""
    prefill_us_per_token: float = Field(default=150.0, ge=0)
    """Time for each prompt token that was not cached."""
    decode_us_per_token: float = Field(default=10_000.0, ge=0)
    """Time between two tokens of a sequence that runs alone."""
    load_factor: float = Field(default=2.0, ge=1)
    """A step with `max_num_seqs` sequences takes this many times a step with one."""
    kv_read_us_per_token: float = Field(default=0.0, ge=0)
    """What a decode step adds for every token of context it reads."""
    step_floor_us: float = Field(default=0.0, ge=0)
    """No step takes less."""

    @model_validator(mode="after")
    def _holds_one_sequence(self) -> "SimulatorConfig":
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"num_blocks x block_size is {self.num_blocks * self.block_size} tokens, less than one sequence of "
                f"max_model_len ({self.max_model_len}): raise num_blocks or lower max_model_len"
            )
        return self
