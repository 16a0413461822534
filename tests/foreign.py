"""Adapters, classifiers and GGUF files as other tools leave them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.tiny import build_tokenizer

TARGETS = ("q_proj", "down_proj")


def peft_model(base: Path, seed: int = 0, **settings: object):
    """A LoRA adapter of PEFT on a base, whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    about = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", "lora_dropout": 0.05}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**about | settings)).eval()
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.1)
    return model


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CLASSIFIERS = {"llama": "LlamaConfig", "gpt2": "GPT2Config", "bert": "BertConfig", "modernbert": "ModernBertConfig"}


def build_classifier(
    folder: Path, kind: str = "llama", *, chat: bool = False, side: str = "right", context: int = 128, **about: object
) -> Path:
    """A random sequence classifier of one label, with its tokenizer."""
    import transformers

    tokenizer = build_tokenizer(folder, chat=chat)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": context, "num_labels": 1, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if kind == "modernbert":
        shape |= {"cls_token_id": 1, "sep_token_id": 2}
    torch.manual_seed(1)
    config = getattr(transformers, CLASSIFIERS[kind])(**shape | about)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def score_by_hand(
    folder: Path, texts: list[tuple[str, ...] | list[dict]], num_labels: int | None = None, **options: object
) -> list[float]:
    """What transformers alone gives each text, pair of texts or conversation, one at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **labels).eval()
    scores = []
    for text in texts:
        if isinstance(text, list):
            coded = tokenizer.apply_chat_template(text, return_tensors="pt", return_dict=True)
        else:
            coded = tokenizer(*text, return_tensors="pt", **options)
        keys = ("input_ids", "token_type_ids") if model.config.model_type == "bert" else ("input_ids",)
        scores.append(float(model(**{key: coded[key] for key in keys if key in coded}).logits[0, 0]))
    return scores


# --- GGUF

GGUF_NAMES = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
GGUF_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(base: Path, file: Path, *, template: str | None = None, name: str = "llama", quantise: bool = False):
    """A tiny Llama as llama.cpp's converter writes it; `name` is what it calls the architecture."""
    import gguf
    from safetensors.torch import load_file

    config, tokenizer = (json.loads((base / n).read_text()) for n in ("config.json", "tokenizer.json"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"] | special
    words = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template(template)
    for key, tensor in load_file(base / "model.safetensors").items():
        weight = tensor.float().numpy()
        to = GGUF_NAMES.get(key)
        if to is None:
            _, _, layer, *part, _ = key.split(".")
            to = f"blk.{layer}.{GGUF_PARTS['.'.join(part)]}"
        for part, count in (("attn_q", heads), ("attn_k", groups)):  # llama.cpp turns neighbours, transformers halves
            if to.endswith(part):
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantise and weight.ndim == 2 and not weight.shape[1] % 32 else None
        weight = weight if kind is None else gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{to}.weight", weight.copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
