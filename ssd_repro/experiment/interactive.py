"""Sliders for a notebook: decode again with another beta or L_d, and redraw in place."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from . import figures, rows


class Listener:
    """One sentence by SSD with sliders for beta and L_d; ``widget`` is what a notebook displays.

    A slider that is let go decodes again, with the same seed, and puts the new player and
    timeline in the place of the old; the voice is the notebook's, warm.
    """

    def __init__(self, voice, text: str, who: str, tolerance: float, draft_length: int, seed: int) -> None:
        import ipywidgets

        self.voice, self.said = voice, {"text": text, "voice": who, "seed": seed}
        self.tolerance = ipywidgets.FloatSlider(
            tolerance, min=0, max=1, step=0.05, description="beta", continuous_update=False
        )
        self.draft_length = ipywidgets.IntSlider(
            draft_length, min=1, max=max(8, draft_length), description="L_d", continuous_update=False
        )
        self.player, self.timeline = ipywidgets.HTML(), ipywidgets.Image(format="png", width=1000)
        sliders = ipywidgets.HBox([self.tolerance, self.draft_length])
        self.widget = ipywidgets.VBox([sliders, self.player, self.timeline])
        for slider in sliders.children:
            slider.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, _change=None) -> None:
        """Decode with the sliders' values; what is shown changes when it is done."""
        beta, length = self.tolerance.value, self.draft_length.value
        take = self.voice.speak(method="speculative", tolerance=beta, draft_length=length, **self.said)
        title = f"SSD, beta {beta:g}, L_d {length}: {take.tokens_per_target_call:.2f} tokens per target call"
        figure = Figure(figsize=(10, 3), layout="constrained")
        figures.timeline(figures.timeline_events(rows.decoding_fields([take])), figure.subplots(), title)
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=100)
            self.timeline.value = buffer.getvalue()
        self.player.value = take._repr_html_()
