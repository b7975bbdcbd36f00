"""Writes tiny models with random weights, so that a real vLLM can be tested without a download.

    .venv-engine/bin/python tests/engine/tiny_models.py FOLDER

`tiny` chats: a Qwen3 of 2 layers and about a million weights, ChatML with Hermes tool calls. What it says is noise,
but at temperature 0 the same noise for the same prompt. `tiny-moe` chats, too: a Qwen3-MoE of 8 experts, two for each
token. `tiny-embed` embeds: a BERT of the same size, mean pooling.
All have a byte-level tokenizer trained on the spot. Runs in the engine's environment (torch, transformers,
tokenizers); deterministic for given versions.
"""

import json
import sys
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SEED = 7
VOCABULARY = 1024
POSITIONS = 16384
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]  # ids 0 to 3
VISIBLE = ["<tool_call>", "</tool_call>"]  # ordinary text to the model, so that a tool parser sees it

# The least that vLLM's CPU kernels take: heads of 32.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 3,
}

_Model = TypeVar("_Model", bound=PreTrainedModel)

# Merges come from here: prose, JSON and digits are what the tests send.
CORPUS = """
A headgate lets water into the channel and opens the spillway when there is too much of it.
Every request has a key, a model and a price, and the ledger keeps one row for each of them.
You are a helpful assistant that answers in one sentence and never makes anything up.
What is the capital of France, and how many people live there? Please answer with a number.
{"city": "Paris", "unit": "celsius", "days": 3, "items": [1, 2, 3], "ok": true, "none": null}
{"name": "get_weather", "arguments": {"city": "Paris"}}
0123456789 10 16 32 64 100 128 256 512 1024 2048 4096
""".strip().splitlines()

TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Any text goes in and comes out unchanged: all 256 bytes are in the alphabet."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(VISIBLE),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in VISIBLE])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=POSITIONS
    )
    fast.chat_template = TEMPLATE
    return fast


def chat_model() -> Qwen3ForCausalLM:
    return with_random_weights(Qwen3ForCausalLM(Qwen3Config(**DECODER)))


def moe_model() -> Qwen3MoeForCausalLM:
    """As many experts as two ranks can share out, every layer sparse."""
    config = Qwen3MoeConfig(**DECODER, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
    return with_random_weights(Qwen3MoeForCausalLM(config))


def embedding_model() -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=3,
    )
    return with_random_weights(BertModel(config))


def with_random_weights(model: _Model) -> _Model:
    """Initial weights are so small that rounding would choose the tokens; wider ones make greedy answers repeat."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                std = 0.2 if "embed" in name or "lm_head" in name else 0.08
                torch.nn.init.normal_(weight, std=std, generator=generator)
    return model.to(torch.bfloat16).eval()


def write_pooling(folder: Path, width: int) -> None:
    """By these files vLLM knows to average the tokens and to scale to unit length."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


def main(folder: Path) -> None:
    words = tokenizer()
    for name, made in (("tiny", chat_model), ("tiny-moe", moe_model)):
        made().save_pretrained(folder / name)
        words.save_pretrained(folder / name)
        GenerationConfig(eos_token_id=2, pad_token_id=3).save_pretrained(folder / name)
    embed = folder / "tiny-embed"
    embedder = embedding_model()
    embedder.save_pretrained(embed)
    words.save_pretrained(embed)
    write_pooling(embed, embedder.config.hidden_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
