"""Tiny random CosyVoice checkpoints in upstream's exact formats, and the forward they stand for.

True are the names, the ids and the sizes of the speech vocabularies; small are the network
and, for version 2, the text vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from ssd_repro.cosyvoice_lm import END_OF_PROMPT, LAYOUTS

TEXT_VOCAB = {2: 300, 3: END_OF_PROMPT + 10}
WORDS = ["a", "b", "c", "d"]


class Upstream(nn.Module):
    """The modules of upstream's Qwen2LM or CosyVoice3LM by their names, and its uncached forward."""

    def __init__(self, version: int, seed: int = 0, hidden: int = 32, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=TEXT_VOCAB[version],
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        self.version, self.speech_token_size = version, 6561
        vocab = {2: 6561 + 3, 3: 6561 + 200}[version]
        self.llm = nn.Module()
        self.llm.model = Qwen2ForCausalLM(config).eval()
        self.speech_embedding = nn.Embedding(vocab, hidden)
        self.llm_decoder = nn.Linear(hidden, vocab, bias=version == 2)
        nn.init.normal_(self.llm_decoder.weight, std=0.5)
        if version == 2:
            self.llm_embedding = nn.Embedding(2, hidden)
        self.sos, self.task_id = {2: (0, 1), 3: (6561, 6563)}[version]
        self.requires_grad_(False)

    def prefix(self, text, prompt_text, prompt_speech) -> torch.Tensor:
        marks = self.llm_embedding if self.version == 2 else self.speech_embedding
        words = self.llm.model.model.embed_tokens(torch.cat((prompt_text, text)))
        parts = (marks.weight[self.sos][None], words, marks.weight[self.task_id][None])
        return torch.cat((*parts, self.speech_embedding(prompt_speech)))[None]

    @torch.no_grad()
    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        out = self.llm.model(inputs_embeds=embeddings, output_hidden_states=True)
        return self.llm_decoder(out.hidden_states[-1])


def save_released(folder: Path, upstream: Upstream, config: bool = True) -> Path:
    """llm.pt and CosyVoice-BlankEN/config.json with the fields that the release has."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(upstream.state_dict(), folder / "llm.pt")
    if config:
        about = upstream.llm.model.config
        names = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads rms_norm_eps tie_word_embeddings max_position_embeddings"
        ).split()
        fields = {name: getattr(about, name) for name in names}
        fields |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0}
        fields |= {"use_sliding_window": False, "sliding_window": 32768, "bos_token_id": 151643}
        (folder / "CosyVoice-BlankEN").mkdir(exist_ok=True)
        (folder / "CosyVoice-BlankEN" / "config.json").write_text(json.dumps(fields))
    return folder


def save_tokenizer(folder: Path, extra: list[str] = (), size: int | None = None) -> int:
    """A word tokenizer with <|endofprompt|> and then ``extra`` -> the id of the first of them."""
    words = {word: i for i, word in enumerate(WORDS)}
    size = size or len(words)
    words |= {f"#{i}": i for i in range(len(words), size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.add_tokens(list(extra))
    tokenizer.save_pretrained(folder)
    return size


def save_converted(folder: Path, upstream: Upstream, head_bias: bool = True) -> Path:
    """The Hugging Face form: speech tokens appended to the text's, rows padded to a multiple of 128.

    head_bias False: as trainers save version 2 that know no bias in Qwen2's head.
    """
    layout, hidden = LAYOUTS[upstream.version], upstream.speech_embedding.embedding_dim
    text = TEXT_VOCAB[upstream.version]
    names = [f"<|s_{i}|>" for i in range(layout.vocab if upstream.version == 3 else 6561)]
    if upstream.version == 2:
        names += ["<|eos1|>", "<|eos2|>", "<|eos3|>", "<|sos|>", "<|task_id|>"]
    else:
        names[6561:6565] = ["<|sos|>", "<|eos1|>", "<|task_id|>", "<|fill|>"]
    first = save_tokenizer(folder, names, size=text)
    rows = -(-(first + len(names)) // 128) * 128
    embed, head = torch.randn(rows, hidden), torch.zeros(rows, hidden)
    embed[:first] = upstream.llm.model.model.embed_tokens.weight
    embed[first : first + layout.vocab] = upstream.speech_embedding.weight
    head[first : first + layout.vocab] = upstream.llm_decoder.weight
    bias = torch.full((rows,), -torch.inf)
    if upstream.version == 2:
        bias[first : first + layout.vocab] = upstream.llm_decoder.bias
        embed[first + layout.vocab : first + layout.vocab + 2] = upstream.llm_embedding.weight
    state = {f"model.{name}": value for name, value in upstream.llm.model.model.state_dict().items()}
    state |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    if head_bias and upstream.version == 2:
        state["lm_head.bias"] = bias
    config = upstream.llm.model.config.to_dict() | {"vocab_size": rows, "tie_word_embeddings": False}
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
