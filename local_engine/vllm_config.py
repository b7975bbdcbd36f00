"""What the operator says about vLLM engines that Headgate runs: the `vllm` block of a pool.

Owns the shape of the block and what can be refused without looking at the machine or the model. What is a plain flag
of vLLM has vLLM's name for it. Refuses to know GPUs that are there, ports that are free, commands.
"""

import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema, model_validator

from local_engine.config import Secret, Section
from local_engine.supervision_config import ScaleConfig, SupervisionConfig

Role = Literal["both", "prefill", "decode"]

_GPU: Final = re.compile(r"(GPU|MIG)-[0-9a-f-]{4,}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the plan itself says: giving one again would make two answers to one question.
_OWN_FLAGS: Final = frozenset(
    {"--model", "--host", "--port", "--api-key", "--served-model-name", "--data-parallel-rank", "--headless"}
)
_OWN_VARIABLES: Final = {
    "VLLM_API_KEY": "a key of your own is the pool's api_key",
    "CUDA_VISIBLE_DEVICES": "gpus says which",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "it follows port",
}


def _gpus(value: Any) -> Any:
    if value in ("auto", "none"):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be auto, none (run on the CPU), or a list of GPU indices or uuids")
    for item in value:
        is_index = isinstance(item, int) and not isinstance(item, bool) and item >= 0
        if not is_index and not (isinstance(item, str) and _GPU.fullmatch(item)):
            raise ValueError(
                f'"{item}" is neither an index (0, 1, ...) nor a uuid (GPU-... or MIG-...) as nvidia-smi -L shows it'
            )
    if len(set(value)) != len(value):
        raise ValueError("the same GPU twice")
    return tuple(value)


def _variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f'"{name}" is not the name of an environment variable')
    if name in _OWN_VARIABLES:
        raise ValueError(f"is set by Headgate: {_OWN_VARIABLES[name]}")
    return name


def _argument(value: str) -> str:
    flag = value.partition("=")[0].replace("_", "-")
    if flag in _OWN_FLAGS:
        raise ValueError(f"{flag} is set by Headgate; there is a setting for it, or it must not be changed")
    return value


Gpus = Annotated[
    Literal["auto", "none"] | tuple[int | str, ...],
    PlainValidator(_gpus),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["auto", "none"]},
                {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
            ]
        }
    ),
]
Count = Annotated[int, Field(ge=1, le=4096)]
Word = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._/-]+$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Variable = Annotated[str, AfterValidator(_variable)]
Argument = Annotated[str, AfterValidator(_argument)]


def served_name(model: str) -> str:
    """What engines call a model that nobody named: the repository, or the folder's last part."""
    is_folder = model.startswith(("/", "./", "../", "~"))
    return model.rstrip("/").rpartition("/")[2] if is_folder else model


class NodeConfig(Section):
    """One more machine with ranks of the same replica."""

    address: str = Field(min_length=1, pattern=r"^[A-Za-z0-9.:_-]+$")
    """Its name or IP address, as this machine reaches it."""
    size_local: Count
    """How many ranks run there."""


class DataParallelConfig(Section):
    """Ranks: engines that each hold all of the model (of a mixture of experts, all but the experts) and a cache of
    their own. For a dense model, `replicas` are simpler."""

    size: Count = 1
    """Ranks of one replica, on all its machines."""
    mode: Literal["internal", "hybrid", "external"] = "internal"
    """`internal`: one address for all ranks, and requests say which; `hybrid`: one address for each machine;
    `external`: one for each rank (mixtures of experts only)."""
    address: str | None = Field(default=None, min_length=1, pattern=r"^[A-Za-z0-9.:_-]+$")
    """This machine, as the others reach it. Needed with `nodes`."""
    rpc_port: Port | None = None
    """Where ranks on other machines report; null: 29550, where there are any."""
    nodes: tuple[NodeConfig, ...] = ()
    """Other machines that hold ranks; those left of `size` run here. Their part is not started by Headgate:
    `headgate engine plan` prints it."""
    backend: Literal["mp", "ray"] = "mp"
    """`ray`: Ray starts the ranks, on this machine and others of its cluster, which has to be there."""
    here: Count | None = None
    """With `backend: ray`: ranks on this machine, when Ray puts others elsewhere; null: all."""

    @property
    def size_local(self) -> int:
        """Ranks on this machine."""
        if self.here is not None:
            return min(self.here, self.size)
        return self.size - sum(node.size_local for node in self.nodes)

    @model_validator(mode="after")
    def _adds_up(self) -> "DataParallelConfig":
        if self.size_local < 1:
            raise ValueError(
                f"the nodes have {self.size - self.size_local} ranks of {self.size}, which leaves none for this machine: "
                "raise size, or lower size_local of a node"
            )
        if self.nodes and self.address is None:
            raise ValueError("address: is needed with nodes, which report to this machine")
        if self.nodes and self.backend == "ray":
            raise ValueError("nodes: Ray knows its machines itself; leave nodes out, or set backend: mp")
        if self.here is not None and (self.backend != "ray" or self.here > self.size):
            raise ValueError(
                f"here: is for backend: ray, and at most size ({self.size}); other machines of vLLM's own are nodes"
            )
        if self.backend == "ray" and self.size == 1:
            raise ValueError(
                "backend: with one rank there is nothing for Ray to place; raise size, or let Ray place the workers of "
                "the one with distributed_executor_backend: ray"
            )
        if self.mode == "external" and any(node.size_local != self.size_local for node in self.nodes):
            raise ValueError("nodes: in external mode every machine has the same number of ranks")
        return self


class EplbConfig(Section):
    """Expert-parallel load balancing: experts that are asked for often get copies."""

    window_size: int = Field(default=1000, ge=1)
    """Steps whose load is counted."""
    step_interval: int = Field(default=3000, ge=1)
    """Steps between two rearrangements."""
    num_redundant_experts: int = Field(default=0, ge=0)
    """Copies, over all ranks."""


class ExpertParallelConfig(Section):
    """Experts of a mixture spread over tensor x data ranks, instead of each cut into pieces."""

    all2all_backend: Word | None = None
    """How tokens travel to their experts, e.g. `deepep_high_throughput` (prefill), `deepep_low_latency` (decode),
    `allgather_reducescatter`; null: vLLM's choice."""
    eplb: EplbConfig | None = None
    """Balance the load of experts; null: not."""
    dual_batch_overlap: bool = False
    """Compute one half of a batch while the other travels (`--enable-dbo`)."""


class PrefixCachingConfig(Section):
    """Prompts that begin alike share what was computed for the beginning."""

    enabled: bool | None = None
    """`false` computes everything anew; null: vLLM's choice, which is to share wherever the model lets it."""
    hash_algorithm: Literal["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"] = "sha256_cbor"
    """What blocks are known by. `sha256_cbor` can be computed outside vLLM, too: the exact prefix index needs it."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens in one block, the unit of sharing; null: vLLM's choice for the hardware."""


class KvOffloadConfig(Section):
    """A second tier of cache, in the machine's memory."""

    size_gib: float = Field(gt=0)
    """Of memory, for each replica, over all its GPUs."""
    backend: Literal["native", "lmcache"] = "native"
    """Who keeps it."""


class SpeculativeConfig(Section):
    """Several tokens guessed and checked at once."""

    method: Word
    """`ngram`, `eagle3`, `mtp`, `draft_model`, ..."""
    model: str | None = Field(default=None, min_length=1)
    """The model that guesses, where the method has one."""
    num_speculative_tokens: int = Field(ge=1, le=64)
    """Guesses at a time."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further keys of vLLM's `--speculative-config`."""


class LoraConfig(Section):
    """Adapters over the model. Each is an upstream model of its own name."""

    adapters: dict[Word, str] = Field(min_length=1)
    """Where each is: a folder or a repository, by the name that targets use."""
    max_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """The highest rank among them."""
    max_loras: int = Field(default=1, ge=1)
    """How many may be used in one batch."""
    max_cpu_loras: int | None = Field(default=None, ge=1)
    """How many are kept in memory; null: `max_loras`."""

    @model_validator(mode="after")
    def _fits(self) -> "LoraConfig":
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras: {self.max_cpu_loras} is less than max_loras ({self.max_loras}); raise it"
            )
        return self


class RolesConfig(Section):
    """Prefill and decode on different replicas: prompts are computed on the first, answers on the second."""

    prefill: Count = 1
    """Replicas that compute prompts."""
    decode: Count = 1
    """Replicas that write answers."""
    connector: Word = "NixlConnector"
    """vLLM's KV connector."""
    load_failure: Literal["recompute", "fail"] = "recompute"
    """What a decode replica does when the prompt's cache does not arrive."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further keys of vLLM's `--kv-transfer-config`."""


class VllmConfig(Section):
    """vLLM engines, started and looked after by Headgate."""

    model: str = Field(min_length=1)
    """A repository (`Qwen/Qwen3-8B`), fetched by vLLM, or a folder."""
    name: str | None = Field(default=None, min_length=1)
    """What targets call it; null: the repository, or the folder's last part."""
    revision: str | None = Field(default=None, min_length=1)
    """A branch, tag or commit of the repository."""
    preset: Word | None = None
    """What is known of a family of models (`headgate engine presets` lists them): its parsers and flags; null: chosen
    by the model's name; `none`: nothing is assumed."""
    replicas: int = Field(default=1, ge=1, le=256)
    """Engines that serve the same. With `roles`, those say how many."""
    gpus: Gpus = Field(default="auto", json_schema_extra={"default": "auto"})
    """`auto`: the machine's GPUs in turn, each for one replica; a list of indices or uuids (`GPU-...`, `MIG-...`);
    `none`: the CPU."""
    tensor_parallel_size: Count = 1
    """GPUs that share each layer."""
    pipeline_parallel_size: Count = 1
    """Groups of GPUs that take turns, each with some of the layers."""
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    """`ray`: the GPUs of tensor and pipeline parallel are those of a Ray cluster, of which this machine is one, and Ray
    gives them out; null: vLLM's choice, on this machine."""
    data_parallel: DataParallelConfig = DataParallelConfig()
    """Ranks with a cache of their own inside one replica."""
    expert_parallel: ExpertParallelConfig | None = None
    """Spread a mixture's experts over the GPUs; `{}` with vLLM's choices, null: not."""
    mixture_of_experts: bool | None = None
    """Whether it is one; null: as its preset says."""
    prefix_caching: PrefixCachingConfig = PrefixCachingConfig()
    """Sharing of what was computed for prompts."""
    kv_offload: KvOffloadConfig | None = None
    """A second tier of cache; null: none."""
    kv_cache_dtype: Word | None = None
    """`fp8` halves the cache; null: as the model is."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """For the cache of each GPU; null: what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of each GPU's memory that the engine may take (of the machine's, on the CPU); null: vLLM's 0.92."""
    max_model_len: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Longest prompt plus answer, in tokens; `auto`: what fits in the cache; null: what the model can, `auto` on the
    CPU."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Sequences that run at once; null: vLLM's choice."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens computed in one step; null: vLLM's choice."""
    max_num_queued_reqs: int | None = Field(default=512, ge=0)
    """Sequences that may wait in an engine before it refuses more, which then go elsewhere; null: any number."""
    max_num_queued_tokens: int | None = Field(default=None, ge=0)
    """The same, for the tokens of their prompts."""
    dtype: Word | None = None
    """`bfloat16`, `float16`, `float32`; null: as the model is."""
    quantization: Word | None = None
    """`fp8`, `awq`, `gptq`, ...; null: as the model says."""
    speculative: SpeculativeConfig | None = None
    """Guess several tokens at once; null: not."""
    lora: LoraConfig | None = None
    """Adapters; null: none."""
    scheduling_policy: Literal["priority", "fcfs"] = "priority"
    """`priority`: the class of a request counts inside the engine, too; `fcfs`: only the order."""
    chunked_prefill: bool | None = None
    """Long prompts in pieces, between the steps of others; null: vLLM's choice."""
    sleep_mode: bool = False
    """Whether it can be put to sleep, giving its GPU memory back."""
    roles: RolesConfig | None = None
    """Prefill and decode apart; null: every replica does both."""
    tool_parser: Word | None = None
    """vLLM's `--tool-call-parser`; null: the preset's, `none`: none."""
    reasoning_parser: Word | None = None
    """vLLM's `--reasoning-parser`; null: the preset's, `none`: none."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A file with another chat template."""
    runner: Literal["auto", "generate", "pooling"] = "auto"
    """`pooling` for embeddings; `auto`: as the model says, taken as `generate` where there is no preset."""
    trust_remote_code: bool | None = None
    """Run code that comes with the model; null: as its preset says, which is mostly no."""
    enforce_eager: bool | None = None
    """Start quicker and answer slower: no compilation, no CUDA graphs; null: no, but yes on the CPU."""
    kv_events: bool = True
    """Tell the gateway what is in the cache, for exact placement."""
    per_request_metrics: bool = False
    """Times in each answer's body (`metrics`), as vLLM measured them."""
    host: str = Field(default="127.0.0.1", min_length=1, pattern=r"^[A-Za-z0-9.:_-]+$")
    """Where engines listen: loopback or a private address, never one that the open network reaches."""
    port: Port | None = None
    """Of the first replica, the others following; null: free ones."""
    api_servers: int | None = Field(default=None, ge=1, le=64)
    """Processes of each replica that take requests; null: vLLM's choice."""
    start_timeout_s: float = Field(default=1800.0, gt=0)
    """Until an engine answers; the first start fetches the weights."""
    drain_timeout_s: float = Field(default=120.0, ge=0)
    """How long requests may take that an engine still has when it is to end; nothing more is sent to it then."""
    shutdown_timeout_s: float = Field(default=20.0, ge=0)
    """How long vLLM itself finishes what it has, once it is told to end. A little later it is killed."""
    scale: ScaleConfig | None = None
    """How many replicas run, by what they have to do; null: `replicas`, until `headgate engine scale` says otherwise."""
    supervision: SupervisionConfig = SupervisionConfig()
    """How engines are watched and restarted."""
    command: tuple[str, ...] = Field(default=("vllm", "serve"), min_length=1)
    """What starts an engine, before its arguments."""
    extra_args: tuple[Argument, ...] = ()
    """Further arguments of `vllm serve`, as they are; they come last and win."""
    env: dict[Variable, Secret] = Field(default_factory=dict)
    """Environment variables of the engines; shown nowhere."""

    @property
    def served_name(self) -> str:
        """What the engines call the model."""
        return served_name(self.model) if self.name is None else self.name

    @property
    def slots(self) -> int:
        """Replicas of all roles."""
        return self.replicas if self.roles is None else self.roles.prefill + self.roles.decode

    @property
    def gpus_per_replica(self) -> int:
        """Devices that one replica has on this machine; 0: Ray gives them out."""
        if self.distributed_executor_backend == "ray":
            return 0
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel.size_local

    def endpoint_name(self, replica: str, rank: int) -> str:
        """What one rank of a replica is called; sessions are placed by it."""
        return replica if self.data_parallel.size == 1 else f"{replica}.r{rank}"

    def role(self, slot: int) -> Role:
        """What the replica at this place is for; those that compute prompts are the first."""
        if self.roles is None:
            return "both"
        return "prefill" if slot < self.roles.prefill else "decode"

    def endpoint_names(self, pool: str) -> list[tuple[str, Role]]:
        """Of all slots and ranks, in their order."""
        ranks = range(self.data_parallel.size)
        return [
            (self.endpoint_name(f"{pool}/{slot}", rank), self.role(slot))
            for slot in range(self.slots)
            for rank in ranks
        ]
