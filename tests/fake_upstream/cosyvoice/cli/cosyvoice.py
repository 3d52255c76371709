"""Upstream's package as far as ssd_repro.zero_shot uses it: its names, signatures, shapes and types; no networks."""

import threading

import numpy as np
import soundfile
import torch
from transformers import AutoTokenizer


class FrontEnd:
    def __init__(self, model_dir):
        self.tokenizer = AutoTokenizer.from_pretrained(f"{model_dir}/CosyVoice-BlankEN")

    def text_normalize(self, text, split=True, text_frontend=True):
        text = text.strip()
        return [piece + "." for piece in text.split(".") if piece.strip()] if split else text

    def _extract_text_token(self, text):
        ids = self.tokenizer([text])["input_ids"][0]
        return torch.tensor([ids], dtype=torch.int32), torch.tensor([len(ids)], dtype=torch.int32)

    def frontend_zero_shot(self, tts_text, prompt_text, prompt_wav, resample_rate, zero_shot_spk_id):
        assert resample_rate == 24000 and zero_shot_spk_id == ""
        audio, rate = soundfile.read(prompt_wav)
        tokens = torch.arange(int(len(audio) / rate * 25), dtype=torch.int32)[None]
        text, length = self._extract_text_token(prompt_text)
        return {
            "prompt_text": text, "prompt_text_len": length, "text": self._extract_text_token(tts_text)[0],
            "llm_prompt_speech_token": tokens, "flow_prompt_speech_token": tokens,
            "prompt_speech_feat": torch.zeros(1, 2 * tokens.shape[1], 80),
            "llm_embedding": torch.zeros(1, 192), "flow_embedding": torch.zeros(1, 192),
        }  # fmt: skip


class Model:
    def __init__(self):
        self.llm, self.silent_tokens, self.lock = torch.nn.Linear(1, 1), [7], threading.Lock()
        self.hift_cache_dict = {}

    def token2wav(
        self,
        token,
        prompt_token,
        prompt_feat,
        embedding,
        token_offset,
        uuid,
        stream=False,
        finalize=False,
        speed=1.0,
    ):
        assert self.hift_cache_dict[uuid] is None and finalize and token_offset == 0
        assert prompt_feat.shape == (1, 2 * prompt_token.shape[1], 80) and embedding.shape == (1, 192)
        pitch = 100 + token[0].numpy().repeat(960) / 30  # 960 samples a token
        return torch.from_numpy(0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 24000))[None].float()


class AutoModel:
    def __init__(self, model_dir):
        self.frontend, self.model, self.sample_rate = FrontEnd(model_dir), Model(), 24000
