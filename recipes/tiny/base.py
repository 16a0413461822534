"""The base model of the tiny world: a small Llama and its tokenizer, trained from scratch on text of that world."""

from __future__ import annotations

import math
import random
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 768, 192
BATCH, LEARNING_RATE, WARMUP = 32, 4e-3, 30
IGNORED = -100  # marks positions without a target for cross-entropy


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the given texts, so it can encode any other text too; puts <s> before a text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model of 0.4 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            # The usual 0.02 suits wide models; at this width copying facts takes ten times as many steps with it.
            initializer_range=0.08,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_model(model: LlamaForCausalLM, rows: list[list[int]], rng: random.Random) -> float:
    """Next-token training over `rows` (token ids, <s> to </s>) once; returns the mean loss of the last 50 steps."""
    batches = batches_of(rows, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, len(batches)))
    losses = []
    model.train()
    for step, batch in enumerate(batches, 1):
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=IGNORED)  # (B, L)
        logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"base: step {step}/{len(batches)}, loss {losses[-1]:.3f}", file=sys.stderr)
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def batches_of(rows: list[list[int]], rng: random.Random) -> list[list[torch.Tensor]]:
    """Batches of rows of similar length, in random order: the rows come shuffled, and are sorted a few batches apart.

    Padding stands at the end of a row, where a causal model cannot see it, so no attention mask is needed.
    """
    window = 8 * BATCH
    batches = []
    for begin in range(0, len(rows), window):
        near = sorted(rows[begin : begin + window], key=len)
        batches += [[torch.tensor(row) for row in near[i : i + BATCH]] for i in range(0, len(near), BATCH)]
    rng.shuffle(batches)
    return batches


def learning_rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / WARMUP) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
