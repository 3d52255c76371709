"""CosyVoice 2 and Fun-CosyVoice 3 as speech language models: ids, prompt layout, lengths, files.

Facts of FunAudioLLM/CosyVoice at ace7c47 (2026-03-16): cosyvoice/llm/llm.py, classes Qwen2LM
and CosyVoice3LM, and ras_sampling of cosyvoice/utils/common.py.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from ..decoding.result import DecodeConfig
from ..errors import InputError, check_number, first_line
from .checkpoints import fill
from .speech_lm import SpeechLM

SPEECH_TOKENS = 6561  # the codes of the speech tokenizer; every id from here on is a mark
END_OF_PROMPT = 151646  # <|endofprompt|> of the text tokenizer, in both versions


@dataclass(frozen=True)
class Layout:
    """The ids of one CosyVoice version.

    vocab      speech_embedding and llm_decoder have so many rows
    sos, task  what begins the prompt and what ends its text: rows of llm_embedding (version
               2) or of speech_embedding (version 3)
    eos        end of speech
    """

    version: int
    vocab: int
    sos: int
    task: int
    eos: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that is no speech ends the sequence (upstream: stop_token_ids)."""
        return tuple(range(SPEECH_TOKENS, self.vocab))

    def config(self, text_tokens: int, **fields) -> DecodeConfig:
        """Upstream's lengths and stop tokens for a text of ``text_tokens`` tokens (prompt text not counted).

        At least 2 and at most 20 speech tokens for each text token (min_token_text_ratio,
        max_token_text_ratio); fields: the others of DecodeConfig, which win.
        """
        check_number("text_tokens", text_tokens, 1, 50_000, whole=True)
        lengths = {"min_tokens": 2 * text_tokens, "max_tokens": 20 * text_tokens}
        # ignore_eos masks 6561 alone, so others may come at once: in version 3 even the end of speech, 6562.
        ids = {"stop_ids": self.stop_ids, "banned_ids": (SPEECH_TOKENS,)}
        return DecodeConfig(**(lengths | ids | fields))


LAYOUTS = {
    2: Layout(2, SPEECH_TOKENS + 3, sos=0, task=1, eos=SPEECH_TOKENS),
    3: Layout(3, SPEECH_TOKENS + 200, sos=SPEECH_TOKENS, task=SPEECH_TOKENS + 2, eos=SPEECH_TOKENS + 1),
}


class CosyVoiceLM(SpeechLM):
    """A SpeechLM that builds CosyVoice's prompt. ``layout``: its ids; ``llm_embedding``: version 2's marks.

    A draft made from it (``make_draft``) is a plain SpeechLM and takes the same prefix.
    """

    def __init__(self, model: Qwen2Model, layout: Layout) -> None:
        super().__init__(model, layout.vocab, bias=layout.version == 2)
        self.layout = layout
        self.llm_embedding = nn.Embedding(2, model.config.hidden_size) if layout.version == 2 else None

    def prefix(self, text: Tensor, prompt_text: Tensor, prompt_speech: Tensor) -> Tensor:
        """[sos, prompt text, text, task, prompt speech] -> embeddings (1, T, hidden).

        text, prompt_text: text token ids (n,); prompt_speech: speech tokens (m,); all int64
        and possibly empty but for text. InputError if an id is outside its vocabulary or if
        version 3 finds no <|endofprompt|> (151646) in the texts.
        """
        words = torch.cat((prompt_text, text))
        if not len(text):
            raise InputError("the text has no tokens; give at least one.")
        _check_ids("a text token", words, self.model.embed_tokens.num_embeddings)
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
    for token in ids[(ids < 0) | (ids >= size)][:1].tolist():
        check_number(name, token, 0, size - 1, whole=True)


# Files

TEXT_MODEL = "CosyVoice-BlankEN"  # the folder of a released model with Qwen2's config.json and tokenizer


def load_cosyvoice(path: str | Path) -> CosyVoiceLM:
    """The language model of CosyVoice 2 or Fun-CosyVoice 3, fp32 on the CPU, in eval mode.

    path: a released model's folder (llm.pt, CosyVoice-BlankEN/config.json), or one .pt file in it (llm.rl.pt):
    the state dict of upstream's Qwen2LM (2) or CosyVoice3LM (3). InputError if it is missing, cut, or of
    another model.
    """
    file = Path(path) / "llm.pt" if Path(path).is_dir() else Path(path)
    state = _read_weights(file)
    rows, vocabs = len(state.get("speech_embedding.weight", ())), {x.vocab: x for x in LAYOUTS.values()}
    if rows not in vocabs:
        sizes = " or ".join(f"{size} (CosyVoice {layout.version})" for size, layout in vocabs.items())
        raise InputError(
            f"{file} is no language model of CosyVoice 2 or 3: its speech_embedding.weight has {rows} rows, not {sizes}"
        )
    config = _read_config(file.parent / TEXT_MODEL / "config.json")
    with torch.device("meta"):
        lm = CosyVoiceLM(Qwen2Model(config), vocabs[rows])
    fill(lm, {name: value.float() for name, value in state.items()}, file, assign=True)
    lm.model.rotary_emb = type(lm.model.rotary_emb)(config)  # no weight: computed
    return lm.eval()


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of llm.pt in our names; the head of text, never used for speech, is left out."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give a released folder of CosyVoice 2 or Fun-CosyVoice 3 (llm.pt, "
            f"{TEXT_MODEL}/config.json) or a .pt file in one"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}  # no epoch, no step
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors ({first_line(error)}): it is cut, a pointer of Git LFS "
            "(run git lfs pull there) or another kind of file"
        ) from None
    tensors.pop("llm.model.lm_head.weight", None)
    renamed = (name.replace("llm.model.model.", "model.").replace("llm_decoder.", "head.") for name in tensors)
    return dict(zip(renamed, tensors.values(), strict=True))


def _read_config(path: Path) -> Qwen2Config:
    try:
        about = json.loads(path.read_text("utf-8"))
        kind = about["model_type"]
        config = Qwen2Config.from_dict(about | {"pad_token_id": None}, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a Qwen2 configuration ({first_line(error)})") from None
    if kind != "qwen2" or set(config.layer_types) != {"full_attention"}:
        raise InputError(f"{path} describes {kind} with {set(config.layer_types)}; it must be qwen2, full attention")
    return config
