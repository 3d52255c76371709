"""CosyVoice 2 and Fun-CosyVoice 3 as speech language models: ids, prompt layout, lengths, files.

Facts of FunAudioLLM/CosyVoice at ace7c47 (2026-03-16): cosyvoice/llm/llm.py, classes Qwen2LM
and CosyVoice3LM, and ras_sampling of cosyvoice/utils/common.py.
"""

from __future__ import annotations

import json
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

from ..decoding.result import DecodeConfig
from ..errors import InputError, check_number, first_line
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
        if not len(text):
            raise InputError("the text has no tokens; give at least one.")
        known = {"a text token": self.model.embed_tokens.num_embeddings, "a prompt speech token": SPEECH_TOKENS}
        for (name, size), ids in zip(known.items(), (words, prompt_speech), strict=True):
            for token in ids[(ids < 0) | (ids >= size)][:1].tolist():
                check_number(name, token, 0, size - 1, whole=True)
        if self.layout.version == 3 and not (words == END_OF_PROMPT).any():
            raise InputError(
                "CosyVoice 3 needs <|endofprompt|> (text token 151646) in the prompt text or the text, for "
                "example 'You are a helpful assistant.<|endofprompt|>' before the prompt text."
            )
        marks = self.llm_embedding or self.speech_embedding
        edge = marks(torch.tensor([self.layout.sos, self.layout.task], device=words.device))
        words, speech = self.model.embed_tokens(words), self.speech_embedding(prompt_speech)
        return torch.cat((edge[:1], words, edge[1:], speech))[None]


# Files

TEXT_MODEL = "CosyVoice-BlankEN"  # the folder of a released model with Qwen2's config.json and tokenizer
QWEN2_05B = {  # what the release's config.json says, for checkpoints that come without it
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 32768,
}
OUR_NAMES = {"llm.model.model.": "model.", "llm_decoder.": "head."}  # of weights: upstream's beginnings -> ours
THEIR_NAMES = {ours: theirs for theirs, ours in OUR_NAMES.items()}


def load_cosyvoice(path: str | Path) -> CosyVoiceLM:
    """The language model of CosyVoice 2 or Fun-CosyVoice 3, in fp32 on the CPU, in eval mode.

    path: a released model's folder (llm.pt, CosyVoice-BlankEN/config.json), one .pt file of
    it (llm.rl.pt), or a folder in the Hugging Face form of upstream's
    pretrained_to_huggingface.py (2) or convert_cosyvoice3_to_hf.py (3). InputError if it is
    none of these, cut, or of another model: it names what is missing.
    """
    path = Path(path)
    file = path / "llm.pt" if path.is_dir() else path
    if file.is_file():
        return _load_released(file)
    if (path / "config.json").is_file():
        return _load_converted(path)
    what = "holds neither llm.pt nor config.json" if path.is_dir() else "does not exist"
    raise InputError(
        f"{path} {what}: give a folder of CosyVoice 2 or Fun-CosyVoice 3 (llm.pt, {TEXT_MODEL}/config.json), a .pt "
        "file from one, or a folder converted to the Hugging Face form"
    )


def _load_released(path: Path) -> CosyVoiceLM:
    """llm.pt: the state dict of upstream's Qwen2LM (2) or CosyVoice3LM (3)."""
    theirs = _read_pt(path)
    layout = _layout(theirs, path)
    theirs.pop("llm.model.lm_head.weight", None)  # the head of text: never used for speech
    state = {_renamed(name, OUR_NAMES): value for name, value in theirs.items()}
    about, lacking = path.parent / TEXT_MODEL / "config.json", ""
    if about.is_file():
        config = _read_config(about)
    else:  # heads and rotations leave no trace in the shapes
        rows = len(state.get("model.embed_tokens.weight", ()))
        config = Qwen2Config(**QWEN2_05B, vocab_size=rows, attn_implementation="sdpa")
        lacking = f"{about} is missing and the weights are not of Qwen2.5-0.5B's shape: put it there; "
    return _assemble(config, layout, layout.version == 2, state, f"{lacking}{path}", THEIR_NAMES)


def _renamed(name: str, beginnings: dict[str, str]) -> str:
    old = next((old for old in beginnings if name.startswith(old)), "")
    return beginnings.get(old, "") + name.removeprefix(old)


def _load_converted(folder: Path) -> CosyVoiceLM:
    """Speech tokens as text tokens <|s_0|>, ...: rows of embed_tokens and lm_head, cut out again."""
    config = _read_config(folder / "config.json")
    if config.vocab_size in [layout.vocab for layout in LAYOUTS.values()]:
        raise InputError(f"{folder} is the export for vLLM, without text embeddings: give the folder with llm.pt")
    try:
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no readable tokenizer ({first_line(error)}): convert the model again") from None
    if "<|s_0|>" not in words:
        raise InputError(f"{folder} is no converted CosyVoice: its tokenizer lacks <|s_0|>; of a release give llm.pt")
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _readable(file):
            state |= load_file(file)
    first, layout = words["<|s_0|>"], LAYOUTS[3 if "<|fill|>" in words else 2]
    end, marks = first + layout.vocab, 2 * (layout.version == 2)  # version 2 has its marks behind the speech tokens
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = len(state.get(name, ()))
        if rows < end + marks:
            raise InputError(f"{folder}: {name} has {rows} rows, too few for its speech tokens {first} to {end - 1}")
    table = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"], state["speech_embedding.weight"] = table[:first], table[first:end]
    for name in {"lm_head.weight", "lm_head.bias"} & state.keys():
        state[name.removeprefix("lm_")] = state.pop(name)[first:end]
    if marks:
        state["llm_embedding.weight"] = table[end : end + marks]
    config.vocab_size = first
    return _assemble(config, layout, "head.bias" in state, state, str(folder), {})


@contextmanager
def _readable(path: Path):
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors ({first_line(error)}): it is cut or another kind of file"
        ) from None


def _read_pt(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a pointer of Git LFS, not the weights: run git lfs pull there")
    with _readable(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; llm.pt holds a dict of tensors")
    state = {name: value for name, value in state.items() if name not in ("epoch", "step")}  # upstream's trainer's
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path}: {_some(strange)} is no tensor; llm.pt holds tensors alone")
    return state


def _layout(state: dict[str, Tensor], path: Path) -> Layout:
    name = "speech_embedding.weight"
    if name not in state:
        first = "it is a CosyVoice 1" if "text_encoder.embed.out.0.weight" in state else f"it has {_some(state)}"
        raise InputError(f"{path} lacks {name}, so it is no language model of CosyVoice 2 or 3: {first}")
    for layout in LAYOUTS.values():
        if len(state[name]) == layout.vocab:
            return layout
    sizes = " or ".join(f"{layout.vocab} (CosyVoice {layout.version})" for layout in LAYOUTS.values())
    raise InputError(f"{path}: {name} has {len(state[name])} rows; it must be {sizes}")


def _read_config(path: Path) -> Qwen2Config:
    try:
        about = json.loads(path.read_text("utf-8"))
        kind = about["model_type"]
        config = Qwen2Config.from_dict(about | {"pad_token_id": None}, attn_implementation="sdpa")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a Qwen2 configuration ({first_line(error)})") from None
    if kind != "qwen2" or set(config.layer_types) != {"full_attention"}:
        raise InputError(f"{path} describes {kind} with {set(config.layer_types)}; it must be qwen2, full attention")
    return config


def _assemble(config: Qwen2Config, layout: Layout, bias: bool, state: dict, path: str, names: dict) -> CosyVoiceLM:
    """Weights in our names -> the model; InputError with the file's ``names`` if they do not fit."""
    with torch.device("meta"):
        lm = CosyVoiceLM(Qwen2Model(config), layout, bias)
    expected, found = ({name: tuple(v.shape) for name, v in s.items()} for s in (lm.state_dict(), state))
    differ = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    wrong = {
        "lacks": expected.keys() - found.keys(),
        "has, unexpectedly,": found.keys() - expected.keys(),
        "has the wrong shape in": [f"{name} {found[name]} instead of {expected[name]}" for name in differ],
    }
    faults = "; ".join(
        f"{what} {_some(_renamed(name, names) for name in wrong[what])}" for what in wrong if wrong[what]
    )
    if faults:
        raise InputError(f"{path} is no whole language model of CosyVoice {layout.version}: it {faults}")
    lm.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    lm.model.rotary_emb = type(lm.model.rotary_emb)(lm.model.config)  # no weight: computed
    return lm.eval()


def _some(names) -> str:
    """The first three names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
