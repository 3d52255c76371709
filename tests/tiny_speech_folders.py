"""Tiny random checkpoints in the formats of Llasa and Orpheus: config, safetensors, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS = [
    f"<|{what}_{place}|>"
    for what in ("TEXT_GENERATION", "TEXT_UNDERSTANDING", "SPEECH_GENERATION", "SPEECH_UNDERSTANDING")
    for place in ("START", "END")
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
)


def tokenizer(added: list[str]) -> PreTrainedTokenizerFast:
    """Llama 3's kind, byte-level BPE, with ``added`` tokens behind its own."""
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=LLAMA, show_progress=False
    )
    whole.train_from_iterator(["convert the text to speech"], trainer)
    whole.post_processor = processors.TemplateProcessing(single=f"{LLAMA[0]} $A", special_tokens=[(LLAMA[0], 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token=LLAMA[0], eos_token=LLAMA[4])
    made.add_tokens(added, special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, kind: str, codes: int = 40) -> PreTrainedTokenizerFast:
    """kind: llasa or orpheus; a bf16 Llama of 4 layers that knows ``codes`` codes and prefers them."""
    speech = [f"<|s_{i}|>" for i in range(codes)]
    made = tokenizer(MARKS + speech if kind == "llasa" else [f"<custom_token_{i}>" for i in range(10 + codes)])
    begin, end = made.bos_token_id, made.eos_token_id
    own = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None, "tie_word_embeddings": True}
    model = tiny("llama", layers=4, vocab=len(made), max_position_embeddings=400, dtype=torch.bfloat16, **own)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return made
