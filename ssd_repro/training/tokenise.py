"""LibriTTS as rows of text and speech tokens, by a CosyVoice's own tokenizers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from ..files import locked
from ..models.cosyvoice import load_cosyvoice
from ..speech import libritts
from ..speech.zero_shot import SYSTEM_TEXT, Tokens
from .parallel import agree, processes, share_rows

LONGEST = 30  # seconds: more the speech tokenizer does not read


def tokenise(weights: Path, data: str, out: Path, accelerator=None, log=print) -> int:
    """Rows as ``ssd-repro train-draft`` reads them -> how many there are; utterances above ``LONGEST`` are left out."""
    accelerator = accelerator or processes()
    version = agree(accelerator, lambda: load_cosyvoice(weights).layout.version)
    front, known = Tokens(Path(weights), version), list(libritts.index(data).values())
    system = {"prompt_text": front.words(SYSTEM_TEXT[version])["input_ids"]} if SYSTEM_TEXT[version] else {}

    def row(spoken: libritts.Spoken) -> dict | None:
        if libritts.seconds(spoken.audio) > LONGEST:
            return None
        own = {"text_ids": front.pieces(spoken.text)[0], "speech": front.speech_tokens(spoken.audio)}
        return {"id": spoken.id, **own, **system}

    with locked(Path(out) / ".run.lock") if accelerator.is_main_process else nullcontext():
        share_rows(Path(out), known, lambda few: [row(one) for one in few], accelerator, log)
    return sum(shard.read_bytes().count(b"\n") for shard in Path(out).glob("*.jsonl"))
