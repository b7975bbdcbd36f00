"""What is known of families of models: parsers, flags, and how large they are.

Owns the reading of the data files in `presets/`, each with the sources of what it says. Refuses to decide: a preset is
a default that the operator's own words replace. A preset is found by the model's name (the last part of a repository
or folder, in small letters), or, for a folder, by the architecture that its config.json names. The last one that
matches wins, so that a file goes from the general to the particular.
"""

import functools
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Final, Literal

_FILES: Final = Path(__file__).parent / "presets"
NONE: Final = "none"
# What a name says of weights that are smaller than the family's own.
_SMALLER: Final = (
    ("fp8", 1.0),
    ("w8a8", 1.0),
    ("int8", 1.0),
    ("nvfp4", 0.56),
    ("mxfp4", 0.56),
    ("int4", 0.56),
)
_SMALLER_MORE: Final = (("awq", 0.56), ("gptq", 0.56), ("w4a16", 0.56), ("4bit", 0.56))

Runner = Literal["generate", "pooling"]


@dataclass(frozen=True, slots=True)
class Size:
    """A model's dimensions; 0: not known.

    `layers` are those that keep a cache of the whole sequence. With multi-head latent attention a layer keeps `latent`
    numbers for each token, on every GPU alike; else two vectors of `head_size` for each of `kv_heads`.
    """

    matches: str = "*"
    parameters: float = 0.0
    bytes_per_parameter: float = 2.0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    latent: int = 0
    experts: int = 0

    @property
    def weights_bytes(self) -> int:
        return int(self.parameters * self.bytes_per_parameter)


@dataclass(frozen=True, slots=True)
class Preset:
    """A family, or a part of it that is served in one way."""

    name: str
    title: str
    matches: tuple[str, ...]
    source: tuple[str, ...]
    mixture_of_experts: bool
    architectures: tuple[str, ...] = ()
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    runner: Runner = "generate"
    trust_remote_code: bool = False
    args: tuple[str, ...] = ()
    note: str = ""
    sizes: tuple[Size, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of one model before it is loaded. `is_moe` is None when nobody knows.

    `alike` is a preset for its architecture, where none has its name.
    """

    preset: Preset | None
    alike: Preset | None
    size: Size
    is_moe: bool | None
    runner: Runner


@functools.cache
def presets() -> dict[str, Preset]:
    """All of them by name, in the order of the files."""
    found: dict[str, Preset] = {}
    for path in sorted(_FILES.glob("*.toml")):
        document = tomllib.loads(path.read_text())
        for entry in document["preset"]:
            found[entry["name"]] = _preset(entry, tuple(document["source"]))
    return found


def describe(model: str, wanted: str | None, folder: Path | None = None) -> Model:
    """The model of this name; `wanted` is a preset's name, None to find it, `none` for none.

    `folder` is read when the weights are there: its config.json says more than any name. KeyError for a preset that
    there is not.
    """
    name = PurePath(model.rstrip("/")).name.lower()
    config = _config(folder) if folder is not None else {}
    preset = None if wanted == NONE else presets()[wanted] if wanted else _named(name)
    alike = _alike(config) if preset is None and wanted is None else None
    size = (
        next((size for size in preset.sizes if fnmatchcase(name, size.matches)), Size()) if preset else Size()
    )
    size = _size(config, folder) if config and folder is not None else _shrunk(size, name)
    is_moe = preset.mixture_of_experts if preset else None
    runner: Runner = preset.runner if preset else "generate"
    if config:
        is_moe = size.experts > 0
        runner = "generate" if _generates(config) else "pooling"
    return Model(preset, alike, size, is_moe, runner)


def _preset(entry: dict[str, Any], source: tuple[str, ...]) -> Preset:
    listed = {name: tuple(entry.get(name, ())) for name in ("matches", "architectures", "args")}
    sizes = tuple(Size(**size) for size in entry.get("sizes", ()))
    return Preset(**{**entry, **listed, "sizes": sizes, "source": source})


def _named(name: str) -> Preset | None:
    found = [
        preset
        for preset in presets().values()
        if any(fnmatchcase(name, pattern) for pattern in preset.matches)
    ]
    return found[-1] if found else None


def _alike(config: dict[str, Any]) -> Preset | None:
    architectures = set(config.get("architectures") or ())
    found = [preset for preset in presets().values() if architectures.intersection(preset.architectures)]
    return found[-1] if found else None


def _shrunk(size: Size, name: str) -> Size:
    """Weights that a name says to be quantised, e.g. `-FP8`."""
    for word, width in (*_SMALLER, *_SMALLER_MORE):
        if word in name:
            return replace(size, bytes_per_parameter=min(width, size.bytes_per_parameter))
    return size


def _config(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says of the language model; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")
    return {**text, "architectures": config.get("architectures")} if isinstance(text, dict) else config


def _size(config: dict[str, Any], folder: Path) -> Size:
    heads = _number(config, "num_attention_heads")
    latent = _number(config, "kv_lora_rank")
    return Size(
        parameters=float(sum(_weight_files(folder))),
        bytes_per_parameter=1.0,  # they are bytes already
        layers=_number(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads") or heads,
        head_size=_number(config, "head_dim") or (_number(config, "hidden_size") // heads if heads else 0),
        latent=latent + _number(config, "qk_rope_head_dim") if latent else 0,
        experts=max(map(functools.partial(_number, config), _EXPERTS)),
    )


_EXPERTS: Final = ("num_experts", "n_routed_experts", "num_local_experts")


def _number(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0


def _weight_files(folder: Path) -> Iterator[int]:
    """The sizes of its weights; several formats of the same are counted once."""
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        if sizes:
            yield from sizes
            return


def _generates(config: dict[str, Any]) -> bool:
    architectures = config.get("architectures") or ()
    return not architectures or any(
        name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in architectures
    )
