"""Tiny random CosyVoice checkpoints in upstream's exact formats, and objects that behave like upstream's.

True are the names, the ids, the sizes of the speech vocabularies, who calls whom and in which
thread; small are the network and the text vocabulary. The decoding here is the plainest one
there is: no cache, each choice by itself.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEXT_VOCAB = 300
WORDS = ["a", "b", "c", "d"]
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)


class Upstream(nn.Module):
    """The modules of upstream's Qwen2LM or CosyVoice3LM by their names, and its uncached forward."""

    def __init__(self, version: int, text_vocab: int = TEXT_VOCAB, hidden: int = 32, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(version)
        config = Qwen2Config(
            vocab_size=text_vocab,
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


def ras_sampling(scores, decoded, sampling, top_p=0.8, top_k=25, win_size=10, tau_r=0.1):
    """Upstream's, since f2ddcbe: the token that repeats is masked and the draw is free of the nucleus."""
    probability, order = scores.softmax(0).sort(descending=True, stable=True)
    size = min(top_k, int((probability.cumsum(0) - probability < top_p).sum()))
    token = int(order[probability[:size].multinomial(1)])
    if decoded[-win_size:].count(token) >= win_size * tau_r:
        scores[token] = -torch.inf
        token = int(scores.softmax(0).multinomial(1))
    return token


class Qwen2LM(Upstream):
    """Upstream's class by name, attributes and calls, for version 2."""

    version_of_class = 2

    def __init__(self, **settings) -> None:
        super().__init__(self.version_of_class)
        self.sampling = partial(ras_sampling, **settings)
        self.stop_token_ids = list(range(6561, self.llm_decoder.out_features))

    def sampling_ids(self, weighted_scores, decoded_tokens, sampling, ignore_eos=True):
        if ignore_eos:
            weighted_scores[self.speech_token_size] = -torch.inf
        return self.sampling(weighted_scores, decoded_tokens, sampling)

    @torch.inference_mode()
    def inference(
        self,
        text,
        text_len,
        prompt_text,
        prompt_text_len,
        prompt_speech_token,
        prompt_speech_token_len,
        embedding,
        sampling=25,
        max_token_text_ratio=20,
        min_token_text_ratio=2,
        uuid="",
    ):
        lm_input = self.prefix(text[0], prompt_text[0], prompt_speech_token[0])
        text_len += prompt_text_len
        low, high = (int((text_len - prompt_text_len) * r) for r in (min_token_text_ratio, max_token_text_ratio))
        yield from self.inference_wrapper(lm_input, sampling, low, high, uuid)

    @torch.inference_mode()
    def inference_wrapper(self, lm_input, sampling, min_len, max_len, uuid):
        out = []
        for i in range(max_len):
            scores = self.logits(lm_input)[0, -1].log_softmax(-1)
            token = self.sampling_ids(scores, out, sampling, ignore_eos=i < min_len)
            if token in self.stop_token_ids:
                break
            yield token
            out.append(token)
            lm_input = torch.cat((lm_input, self.speech_embedding.weight[token][None, None]), 1)


class CosyVoice3LM(Qwen2LM):
    version_of_class = 3


class Model:
    """CosyVoice2Model as far as it decodes: a thread for each text, tokens in a dict as they come."""

    def __init__(self, llm, fp16: bool = False) -> None:
        self.llm, self.fp16 = llm, fp16
        self.tts_speech_token_dict, self.llm_end_dict, self.lock = {}, {}, threading.Lock()

    def llm_job(self, text, prompt_text, llm_prompt_speech_token, llm_embedding, uuid):
        lengths = (torch.tensor([part.shape[1]]) for part in (text, prompt_text, llm_prompt_speech_token))
        text_len, prompt_text_len, speech_len = lengths
        with torch.autocast("cpu", torch.bfloat16, enabled=self.fp16):
            for token in self.llm.inference(
                text=text,
                text_len=text_len,
                prompt_text=prompt_text,
                prompt_text_len=prompt_text_len,
                prompt_speech_token=llm_prompt_speech_token,
                prompt_speech_token_len=speech_len,
                embedding=llm_embedding,
                uuid=uuid,
            ):
                self.tts_speech_token_dict[uuid].append(token)
        self.llm_end_dict[uuid] = True

    def tts(self, text, prompt_text, llm_prompt_speech_token, stream=False, hop=5, **_):
        key = str(uuid.uuid1())
        with self.lock:
            self.tts_speech_token_dict[key], self.llm_end_dict[key] = [], False
        args = (text, prompt_text, llm_prompt_speech_token, None, key)
        job = threading.Thread(target=self.llm_job, args=args, daemon=True)
        job.start()
        sent = 0
        while stream and not (self.llm_end_dict[key] and len(self.tts_speech_token_dict[key]) - sent < hop):
            if len(self.tts_speech_token_dict[key]) - sent >= hop:
                yield {"tokens": self.tts_speech_token_dict[key][sent : sent + hop]}
                sent += hop
            time.sleep(0.005)
        job.join()
        yield {"tokens": self.tts_speech_token_dict[key][sent:]}
        with self.lock:
            self.tts_speech_token_dict.pop(key), self.llm_end_dict.pop(key)


class CosyVoice:
    def __init__(self, llm, fp16: bool = False) -> None:
        self.model = Model(llm, fp16)


def save_released(folder: Path, upstream: Upstream) -> Path:
    """llm.pt and CosyVoice-BlankEN/config.json with the fields that the release has."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(upstream.state_dict(), folder / "llm.pt")
    about = upstream.llm.model.config
    fields = {name: getattr(about, name) for name in FIELDS}
    fields |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0}
    fields |= {"use_sliding_window": False, "sliding_window": 32768, "bos_token_id": 151643}
    (folder / "CosyVoice-BlankEN").mkdir(exist_ok=True)
    (folder / "CosyVoice-BlankEN" / "config.json").write_text(json.dumps(fields))
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of ``size`` words."""
    words = {word: i for i, word in enumerate(WORDS)}
    words |= {f"#{i}": i for i in range(len(words), size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
