"""Sliders: one decodes again in a running notebook, one needs no kernel and works in a saved page, too."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence

from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from seaborn import despine

from ..errors import InputError
from ..speech.take import Take
from . import figures, rows

BARS = {"draft p": figures.PALETTE[1], "target q": figures.PALETTE[0], "emitted": figures.PALETTE[2]}
WIDE, HIGH, GROUP = 720, 200, 0.8  # of the drawing, and a token's bars' share of its place
# What the slider does. Jupyter and a saved page both run a handler that an element carries; scripts they may not.
MOVED = (
    "const f=JSON.parse(this.dataset.frames)[this.value],b=this.closest('figure');"
    "b.querySelectorAll('rect.emitted').forEach((r,i)=>"
    "{r.setAttribute('y',f.y[i]);r.setAttribute('height',f.height[i])});b.querySelector('output').textContent=f.text"
)


def tolerance_slider(p: Sequence[float], q: Sequence[float], emitted: dict[str, Sequence[float]], start: int) -> HTML:
    """Bars of p, q (V,) and of what is emitted, with a slider over its frames: text -> (V,), beginning at ``start``.

    It is one element of HTML and SVG that asks for nothing else, and so works in a saved page.
    """
    scale = (HIGH - 20) / max(max(values) for values in (p, q, *emitted.values()))
    frames = [
        {"text": text, "height": [round(scale * x, 1) for x in made], "y": [round(HIGH - scale * x, 1) for x in made]}
        for text, made in emitted.items()
    ]
    place, first = WIDE / len(p), list(emitted.values())[start]
    width, marks = GROUP * place / len(BARS), []
    for number, ((name, colour), values) in enumerate(zip(BARS.items(), (p, q, first), strict=True)):
        kind, fill = name.partition(" ")[0], to_hex(colour)
        for token, value in enumerate(values):
            x, tall = (token + (1 - GROUP) / 2) * place + number * width, scale * value
            at = f'x="{x:.1f}" y="{HIGH - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"'
            marks.append(f'<rect class="{kind}" {at} fill="{fill}"/>')
        marks.append(f'<rect x="{10 + 110 * number}" y="4" width="12" height="12" fill="{fill}"/>')
        marks.append(f'<text x="{28 + 110 * number}" y="15" font-size="14">{name}</text>')
    for token in range(len(p)):
        middle = (token + 0.5) * place
        marks.append(f'<text x="{middle:.1f}" y="{HIGH + 18}" font-size="13" text-anchor="middle">{token}</text>')
    marks.append(f'<line x1="0" x2="{WIDE}" y1="{HIGH}" y2="{HIGH}" stroke="#555"/>')
    moved = f'data-frames="{html.escape(json.dumps(frames))}" oninput="{html.escape(MOVED)}"'
    return HTML(
        '<figure style="margin:0;padding:12px;max-width:760px;background:#fff;color:#222;font-family:sans-serif">'
        f'<svg viewBox="0 0 {WIDE} {HIGH + 26}" width="100%" role="img" fill="#222">{"".join(marks)}</svg>'
        f'<label>tolerance <input type="range" min="0" max="{len(frames) - 1}" value="{start}" style="width:60%" '
        f'aria-label="tolerance" {moved}></label>'
        f"<br><output>{html.escape(frames[start]['text'])}</output></figure>"
    )


class Listener:
    """A text by SSD and, beside it, by the target alone, decoded again at each change.

    ``widget`` is what a notebook displays; ``note`` says that it decodes, what came out, or what is wrong.
    """

    def __init__(self, voice, utterance, tolerance: float, draft_length: int) -> None:
        import ipywidgets as widgets

        self.voice, self.seed, self.alone = voice, utterance.seed, None
        late, wide = {"continuous_update": False}, widgets.Layout(width="98%")  # one decode a slide, not one a pixel
        self.text = widgets.Text(utterance.text, description="text", layout=wide, **late)
        self.speaker = widgets.Dropdown(options=voice.names, value=utterance.voice, description="voice")
        self.tolerance = widgets.FloatSlider(tolerance, min=0, max=1, step=0.05, description="beta", **late)
        self.draft_length = widgets.IntSlider(draft_length, min=1, max=max(8, draft_length), description="L_d", **late)
        self.note, self.target, self.player = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.timeline = widgets.Image(format="png", width=1000)
        controls = (self.text, self.speaker, self.tolerance, self.draft_length)
        players = widgets.HBox([self.target, self.player])
        self.widget = widgets.VBox([controls[0], widgets.HBox(controls[1:]), self.note, players, self.timeline])
        for control in controls:
            control.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, _change=None) -> None:
        self.note.value = "decoding ..."
        try:
            self._redraw()
        except InputError as error:
            self.note.value = html.escape(str(error))

    def _redraw(self) -> None:
        beta, length, said = self.tolerance.value, self.draft_length.value, (self.text.value, self.speaker.value)
        if not self.alone or (self.alone.text, self.alone.voice) != said:
            self.alone = self._speak("autoregressive")
            self.target.value = self.alone._repr_html_()
        take = self._speak("speculative", tolerance=beta, draft_length=length)
        title = f"SSD, beta {beta:g}, L_d {length}: {take.tokens_per_target_call:.2f} tokens per target call"
        figure = Figure(figsize=(10, 3), layout="constrained")
        figures.timeline(figures.timeline_events(rows.decoding_fields([take])), figure.subplots(), title)
        despine(figure, left=True)
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=100)
            self.timeline.value = buffer.getvalue()
        self.player.value = take._repr_html_()
        both = self.alone.lm_rtf and take.lm_rtf
        faster = f"{self.alone.lm_rtf / take.lm_rtf:.2f} times as fast as" if both else "not comparable with"
        self.note.value = f"SSD, this once: <b>{faster}</b> the target alone. Single decodes vary."

    def _speak(self, method: str, **settings) -> Take:
        return self.voice.speak(self.text.value, method, voice=self.speaker.value, seed=self.seed, **settings)
