"""Sliders for a notebook: decode again with another beta or L_d, and redraw in place."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from seaborn import despine

from . import figures, rows


class Listener:
    """One utterance by SSD with sliders for beta and L_d; ``widget`` is what a notebook displays."""

    def __init__(self, voice, utterance, tolerance: float, draft_length: int) -> None:
        from ipywidgets import HTML, FloatSlider, HBox, Image, IntSlider, VBox

        self.voice, self.utterance = voice, utterance
        self.tolerance = FloatSlider(tolerance, min=0, max=1, step=0.05, description="beta", continuous_update=False)
        most = max(8, draft_length)
        self.draft_length = IntSlider(draft_length, min=1, max=most, description="L_d", continuous_update=False)
        self.player, self.timeline = HTML(), Image(format="png", width=1000)
        self.widget = VBox([HBox([self.tolerance, self.draft_length]), self.player, self.timeline])
        for slider in (self.tolerance, self.draft_length):
            slider.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, _change=None) -> None:
        beta, length = self.tolerance.value, self.draft_length.value
        spoken = {"voice": self.utterance.voice, "seed": self.utterance.seed}
        take = self.voice.speak(self.utterance.text, "speculative", tolerance=beta, draft_length=length, **spoken)
        title = f"SSD, beta {beta:g}, L_d {length}: {take.tokens_per_target_call:.2f} tokens per target call"
        figure = Figure(figsize=(10, 3), layout="constrained")
        figures.timeline(figures.timeline_events(rows.decoding_fields([take])), figure.subplots(), title)
        despine(figure, left=True)
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=100)
            self.timeline.value = buffer.getvalue()
        self.player.value = take._repr_html_()
