"""LibriTTS as rows of text and speech tokens, by a CosyVoice's own tokenizers."""

from __future__ import annotations

from pathlib import Path

from ..files import append_rows, drop_half_line, locked, read_rows
from ..models.cosyvoice import load_cosyvoice
from ..processes import process
from ..speech import libritts
from ..speech.zero_shot import SYSTEM_TEXT, Tokens

ROWS_AT_ONCE = 100  # are put on the disk together


def tokenise(weights: Path, data: str, out: Path, log=print) -> int:
    """LibriTTS -> rows of text and speech tokens, as ``ssd-repro train-draft`` reads them; -> how many there are.

    Several processes take turns; each writes ``<out>/part<rank>.jsonl`` and makes no id twice,
    whoever made it before. Utterances above 30 s, which the speech tokenizer does not read, are
    left out. InputError if the checkpoint or the data lacks something.
    """
    version = load_cosyvoice(weights).layout.version
    front, known = Tokens(Path(weights), version), list(libritts.index(data).values())
    rank, world = process()
    out, own = Path(out), Path(out) / f"part{rank}.jsonl"
    with locked(own.with_suffix(".lock")):
        for part in (p for p in out.glob("part*.jsonl") if rank == 0 and int(p.stem[4:]) >= world):
            with locked(part.with_suffix(".lock")):  # of an earlier run with more processes
                drop_half_line(part)
        drop_half_line(own)
        done = {row["id"] for part in out.glob("*.jsonl") for row in read_rows(part)}
        mine = [one for one in known[rank::world] if one.id not in done and libritts.seconds(one.audio) <= 30]
        for start in range(0, len(mine), ROWS_AT_ONCE):
            rows = [_row(front, one) for one in mine[start : start + ROWS_AT_ONCE]]
            append_rows(own, rows)
            log(f"{start + len(rows)} of {len(mine)} utterances")
    return len(done) + len(mine)


def _row(front: Tokens, one: libritts.Spoken) -> dict:
    before = front.words(SYSTEM_TEXT[front.version])["input_ids"] if SYSTEM_TEXT[front.version] else []
    row = {"id": one.id, "text_ids": front.pieces(one.text)[0], "speech": front.speech_tokens(one.audio)}
    return row | ({"prompt_text": before} if before else {})
