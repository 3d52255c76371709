"""CosyVoice 2 and Fun-CosyVoice 3 as speech language models: ids, prompt layout, sampling law.

Facts of FunAudioLLM/CosyVoice at ace7c47 (2026-03-16): cosyvoice/llm/llm.py, classes Qwen2LM
and CosyVoice3LM, and ras_sampling of cosyvoice/utils/common.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2Model

from .decoding import DecodeConfig
from .errors import InputError
from .sampling import check_number
from .speech_lm import SpeechLM

SPEECH_TOKENS = 6561  # the codes of the speech tokenizer; every id from here on is a mark
END_OF_PROMPT = 151646  # <|endofprompt|> of the text tokenizer, in both versions


@dataclass(frozen=True)
class Layout:
    """The ids of one CosyVoice version.

    vocab      speech_embedding and llm_decoder have so many rows
    sos, task  what begins the prompt and what ends its text: rows of llm_embedding (version
               2) or of speech_embedding (version 3)
    eos, fill  end of speech; 'more text please' of the streaming-text mode, unused here
    """

    version: int
    vocab: int
    sos: int
    task: int
    eos: int
    fill: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that is no speech ends the sequence (upstream: stop_token_ids)."""
        return tuple(range(SPEECH_TOKENS, self.vocab))

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """What upstream's ignore_eos masks before the minimum length: this one id, in both versions.

        In version 2 it is the end of speech, the other two stop tokens stay possible. In
        version 3 it is sos: its end of speech, 6562, stays possible before the minimum length.
        """
        return (SPEECH_TOKENS,)


LAYOUTS = {
    2: Layout(2, SPEECH_TOKENS + 3, sos=0, task=1, eos=SPEECH_TOKENS, fill=SPEECH_TOKENS + 2),
    3: Layout(
        3,
        SPEECH_TOKENS + 200,
        sos=SPEECH_TOKENS,
        eos=SPEECH_TOKENS + 1,
        task=SPEECH_TOKENS + 2,
        fill=SPEECH_TOKENS + 3,
    ),
}


class CosyVoiceLM(SpeechLM):
    """A SpeechLM that builds CosyVoice's prompt. ``layout``: its ids; ``llm_embedding``: version 2's marks.

    A draft made from it (``make_draft``) is a plain SpeechLM and takes the same prefix.
    """

    def __init__(self, model: Qwen2Model, layout: Layout, bias: bool | None = None) -> None:
        """bias: of the head; None is as released: version 2 has one, version 3 has none."""
        super().__init__(model, layout.vocab, bias=layout.version == 2 if bias is None else bias)
        self.layout = layout
        self.llm_embedding = nn.Embedding(2, model.config.hidden_size) if layout.version == 2 else None

    def prefix(self, text: Tensor, prompt_text: Tensor, prompt_speech: Tensor) -> Tensor:
        """[sos, prompt text, text, task, prompt speech] -> embeddings (1, T, hidden).

        text, prompt_text: text token ids (n,); prompt_speech: speech tokens (m,); all int64
        and possibly empty but for text. InputError if an id is outside its vocabulary or if
        version 3 finds no <|endofprompt|> (151646) in the texts.
        """
        words = torch.cat((prompt_text, text))
        rows = self.model.embed_tokens.num_embeddings
        if not len(text):
            raise InputError("the text has no tokens; give at least one.")
        _check_ids("a text token", words, rows)
        _check_ids("a prompt speech token", prompt_speech, SPEECH_TOKENS)
        if self.layout.version == 3 and not (words == END_OF_PROMPT).any():
            raise InputError(
                "CosyVoice 3 needs <|endofprompt|> (text token 151646) in the prompt text or the text, for "
                "example 'You are a helpful assistant.<|endofprompt|>' before the prompt text."
            )
        marks = self.llm_embedding or self.speech_embedding
        edge = marks(torch.tensor([self.layout.sos, self.layout.task], device=words.device))
        words, speech = self.model.embed_tokens(words), self.speech_embedding(prompt_speech)
        return torch.cat((edge[:1], words, edge[1:], speech))[None]


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise InputError(f"{name}s have dtype {ids.dtype} and {ids.dim()} dimensions; give int64 (n,).")
    for token in ids[(ids < 0) | (ids >= size)][:1].tolist():
        check_number(name, token, 0, size - 1, whole=True)


def decode_config(layout: Layout, text_tokens: int, **fields) -> DecodeConfig:
    """Upstream's lengths and stop tokens for a text of ``text_tokens`` tokens (prompt text not counted).

    At least 2 and at most 20 speech tokens a text token (min_token_text_ratio,
    max_token_text_ratio); fields: the others of DecodeConfig, which win.
    """
    check_number("text_tokens", text_tokens, 1, 50_000, whole=True)
    lengths = {"min_tokens": 2 * text_tokens, "max_tokens": 20 * text_tokens}
    ids = {"stop_ids": layout.stop_ids, "banned_ids": layout.banned_ids}
    return DecodeConfig(**(lengths | ids | fields))
