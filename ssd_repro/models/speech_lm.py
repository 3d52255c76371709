"""A language model over speech tokens: a transformers decoder, a speech embedding and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..errors import InputError
from .batch_session import BatchSession
from .families import mask_for

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SpeechLM(nn.Module):
    """Prefix embeddings (1, T, hidden), then speech tokens -> speech-token logits (V).

    model: a transformers decoder without head, full attention, used through inputs_embeds
    (``families``; its own embeddings are the text's). Token x enters as
    speech_embedding(x), comes out as row x of ``head``.
    taps: depths whose hidden states its sessions hand out as ``features``, for drafters that read them:
    the residual stream after so many layers, at the full depth behind the final norm.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel, speech_vocab: int, bias: bool = True) -> None:
        super().__init__()
        hidden = model.config.hidden_size
        self.model = model
        self.speech_embedding = nn.Embedding(speech_vocab, hidden)
        self.head = nn.Linear(hidden, speech_vocab, bias=bias)

    def prefix(self, text: Tensor, prompt_text: Tensor, prompt_speech: Tensor) -> Tensor:
        """[prompt text, text, prompt speech] -> embeddings (1, T, hidden); all int64 (n,), marks among the text's ids.

        The one place that says what stands before the first speech token to be said.
        """
        words = self.model.get_input_embeddings()(torch.cat((prompt_text, text)))
        return torch.cat((words, self.speech_embedding(prompt_speech)))[None]

    def forward(self, inputs_embeds: Tensor, at: Tensor | None = None) -> Tensor:
        """Without a cache, causal: (B, T, hidden) -> logits (B, T, V). Pad batches on the right.

        at: bool (B, T), of n places -> the logits of these alone, (n, V).
        """
        return self._made(inputs_embeds, at, ())[0]

    def with_features(self, inputs_embeds: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``forward``, and the hidden states at the ``taps``, (B, T, taps x hidden); None without taps."""
        return self._made(inputs_embeds, at, self.taps)

    def _made(self, inputs_embeds: Tensor, at: Tensor | None, taps: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        hidden, features = _decode(self.model, inputs_embeds, 0, None, taps)
        return self.head(hidden if at is None else hidden[at]), features

    def session(self) -> Session:
        return Session(self)

    def batch(self, prefixes: list[Tensor], room: int) -> tuple[BatchSession, Tensor]:
        """As ``decoding.batch.BatchModel``: prefixes (1, T, hidden) -> session of B sequences, logits (B, V)."""
        session = BatchSession(self, [prefix.shape[1] for prefix in prefixes], room)
        return session, session.prefill(prefixes)

    def cast(self, precision: str) -> SpeechLM:
        """Parameters to 'fp32' or 'bf16', in place; a draft's shared ones change with its target's.

        The rotary frequencies stay float32: ``to(torch.bfloat16)`` would round them too, and
        at position 500 that is an angle wrong by up to a radian. InputError for another name.
        """
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r} is unknown: choose {' or '.join(PRECISIONS)}")
        cast_parameters(self, PRECISIONS[precision])
        return self


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """In place; buffers stay as they are, the rotary frequencies among them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix (m, n) -> int8 of -127 .. 127 and a scale of each row, (m, 1), whose product is near it."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


class Session:
    """One sequence of a SpeechLM: it owns the cache, the model holds none.

    ``length``: the positions in the cache, prefix included; counted here, so that nothing
    is read from the device and another cache can take the place of DynamicCache.
    ``features`` (1, n, taps x hidden): hidden states at the model's ``taps`` of the n positions fed last.
    """

    def __init__(self, lm: SpeechLM, cache: Cache | None = None) -> None:
        self.lm = lm
        self.cache = DynamicCache(config=lm.model.config) if cache is None else cache
        self.length, self.features = 0, None

    def prefill(self, prefix: Tensor) -> Tensor:
        """Embeddings (1, T, hidden), T >= 1 -> logits (1, V) of the last position."""
        if self.length:
            raise RuntimeError("a session is prefilled once; open a new one")
        return self.feed(prefix)

    def feed(self, embeddings: Tensor) -> Tensor:
        """Embeddings (1, n, hidden), n >= 1 -> logits (1, V) of the last position."""
        return self.lm.head(self._feed(embeddings)[:, -1])

    def extend(self, tokens: Tensor) -> Tensor:
        """Speech tokens (1, n) int64 -> logits (1, n, V), what follows each."""
        return self.lm.head(self._feed(self.lm.speech_embedding(tokens)))

    def crop(self, length: int) -> None:
        """The one rollback: forget every position from ``length`` (at most self.length) on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}")
        if length < self.length:  # transformers 5.0's crop(0) empties the cache, 5.20's does nothing
            self.cache.crop(length - self.length)  # minus the number to remove
        self.length = length

    def _feed(self, embeddings: Tensor) -> Tensor:
        hidden, self.features = _decode(self.lm.model, embeddings, self.length, self.cache, self.lm.taps)
        self.length += embeddings.shape[1]
        return hidden


def _decode(
    model: nn.Module, embeddings: Tensor, past: int, cache: Cache | None, taps: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """Run the decoder on (B, n, hidden) after ``past`` cached positions -> (B, n, hidden), (B, n, taps x hidden).

    transformers would build its mask anew each call; of the three cases only the last needs
    one: a single token sees everything, a first block is SDPA's own causal case, several
    tokens after a cache see it and each other causally.
    """
    n, device = embeddings.shape[1], embeddings.device
    mask = None
    if n > 1 and past:
        mask = torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)[None, None]
    made = model(
        inputs_embeds=embeddings,
        attention_mask=mask_for(model, mask),
        position_ids=torch.arange(past, past + n, device=device)[None],
        past_key_values=cache,
        use_cache=cache is not None,
        output_hidden_states=bool(taps),
    )
    return made.last_hidden_state, features_at(taps, made.hidden_states)


def features_at(taps: tuple[int, ...], states: tuple[Tensor, ...] | None) -> Tensor | None:
    """Of what ``output_hidden_states`` gives, (B, n, hidden) each, the taps side by side; None without taps."""
    return torch.cat([states[tap] for tap in taps], -1) if taps else None


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for auto, cpu or cuda; InputError for another name, and for a GPU that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r} is unknown: choose auto, cpu or cuda")
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise InputError("device 'cuda' was asked for and this machine has none that torch can use: choose cpu or auto")
    return ("cuda" if present else "cpu") if device == "auto" else device
