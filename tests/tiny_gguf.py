"""A language model for llama.cpp that is made in code: 600 kB, random weights, a vocabulary of bytes and short words.

`python -m tests.tiny_gguf FILE` writes it. Needs gguf.
"""

import string
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

CONTEXT_TOKENS = 2048
_CONTROL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_WORDS = ("▁", *string.ascii_letters, *string.digits, *(a + b for a in string.ascii_lowercase for b in "aeioutn"))
_TYPES = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * len(_BYTES)
_WIDTH, _LAYERS, _HEADS, _FEED_FORWARD = 64, 2, 4, 128


def write(path: Path) -> None:
    """Write the model; the same bytes every time."""
    tokens = [*_CONTROL, *_BYTES, *_WORDS]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(_CONTROL + _BYTES) + [-float(rank) for rank in range(len(_WORDS))])
    writer.add_token_types([*_TYPES, *([gguf.TokenType.NORMAL] * len(_WORDS))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    for name, tensor in _tensors(len(tokens)):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(vocabulary: int) -> list[tuple[str, NDArray[np.float32]]]:
    generator = np.random.default_rng(0)

    def random(*shape: int) -> NDArray[np.float32]:
        return (0.05 * generator.standard_normal(shape)).astype(np.float32)

    ones = np.ones(_WIDTH, np.float32)
    tensors = [("token_embd.weight", random(vocabulary, _WIDTH)), ("output.weight", random(vocabulary, _WIDTH))]
    tensors.append(("output_norm.weight", ones))
    for layer in range(_LAYERS):
        block = f"blk.{layer}."
        tensors += [(f"{block}attn_{part}.weight", random(_WIDTH, _WIDTH)) for part in ("q", "k", "v", "output")]
        tensors += [(f"{block}ffn_{part}.weight", random(_FEED_FORWARD, _WIDTH)) for part in ("gate", "up")]
        tensors += [(f"{block}ffn_down.weight", random(_WIDTH, _FEED_FORWARD))]
        tensors += [(f"{block}{part}_norm.weight", ones) for part in ("attn", "ffn")]
    return tensors


if __name__ == "__main__":
    write(Path(sys.argv[1]))
