"""Tiny random models and datasets, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = """the cat sat on the mat and the dog ran to the park. once upon a time a small bird sang a sweet song.
Human: what is the time? Assistant: it is noon. thank you very much! red green blue one two three four five six."""
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARCHITECTURES = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma", "gemma2", "gemma3")


def build_tokenizer(folder: Path, *, chat: bool = False, pad: str | None = "<pad>", bos: bool = True):
    """A byte-level BPE tokenizer of about 300 tokens; `pad` may be None or equal to EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token=pad
    )
    if chat:
        fast.chat_template = CHAT
        fast.add_special_tokens({"additional_special_tokens": SPECIALS[4:]})
    fast.save_pretrained(folder)
    return fast


def build_config(architecture: str, vocabulary: int, context: int = 128):
    """A transformers config of two small layers."""
    import transformers as t

    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture == "llama-wide":  # wide enough for layers in 4 bits
        return t.LlamaConfig(**shape | {"hidden_size": 64, "intermediate_size": 128})
    if architecture in ("llama", "llama-tied"):
        return t.LlamaConfig(**shape, tie_word_embeddings=architecture == "llama-tied")
    if architecture == "qwen2":
        return t.Qwen2Config(**shape)
    if architecture == "qwen3":
        return t.Qwen3Config(**shape, head_dim=8)
    if architecture == "mistral":
        return t.MistralConfig(**shape, sliding_window=6)
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context, "vocab_size": vocabulary}
        return t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    if architecture == "gpt_neox":
        return t.GPTNeoXConfig(**{k: v for k, v in shape.items() if k != "num_key_value_heads"}, hidden_dropout=0.1)
    if architecture == "gemma":
        return t.GemmaConfig(**shape, head_dim=8)
    if architecture == "gemma2":
        return t.Gemma2Config(
            **shape, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
            query_pre_attn_scalar=8,
        )  # fmt: skip
    if architecture == "gemma3":
        return t.Gemma3TextConfig(**shape, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
    raise AssertionError(architecture)


def build_model(
    folder: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    chat: bool = False,
    pad: str | None = "<pad>",
    context: int = 128,
    scale: float = 0.2,
) -> Path:
    """A random model with its tokenizer in a folder; weights are large enough that its text is not uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(folder, chat=chat, pad=pad)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(build_config(architecture, len(tokenizer), context))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, scale)
    model.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
