"""Episodes as moving pictures: GIF files whose bytes depend on the pictures alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from springhead.rl.dataset import Episode

Pictures = npt.NDArray[np.uint8]

_BAR = 22
_PAPER, _INK, _ALARM = (250, 250, 250), (30, 30, 30), (213, 94, 0)
_MILLISECONDS = 80
_LAST_MILLISECONDS = 1500


def write_gif(path: Path, pictures: Pictures, episode: Episode, every: int, colours: int) -> None:
    """Writes an episode as a GIF that tells time, return and cost below each picture.

    The line below turns red where the steps since the picture before cost something.

    Args:
        path: The file.
        pictures: (P, height, width, 3), one every ``every`` steps from the start on, and one of the last state.
        episode: The episode of T steps that they show.
        every: Steps from one picture to the next.
        colours: Colours of the whole film, at most 256.
    """
    at = np.append(np.arange(len(pictures) - 1) * every, episode.length)
    returns, costs = (np.append(0.0, np.cumsum(x, dtype=np.float64)) for x in (episode.rewards, episode.costs))
    frames = []
    for number, (picture, step) in enumerate(zip(pictures, at.tolist(), strict=True)):
        since = at[number - 1] if number else 0
        text = f"step {step}   return {returns[step]:.1f}   cost {costs[step]:g}"
        frames.append(_with_line(picture, text, bool(costs[step] > costs[since])))
    # One palette for the whole film, from every picture: colours that change with each picture flicker.
    height = frames[0].height
    strip = Image.new("RGB", (frames[0].width, height * len(frames)))
    for number, frame in enumerate(frames):
        strip.paste(frame, (0, number * height))
    palette = strip.quantize(colours, Image.Quantize.MEDIANCUT)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [_MILLISECONDS] * (len(drawn) - 1) + [_LAST_MILLISECONDS]
    drawn[0].save(
        path, format="GIF", save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=False
    )


def _with_line(picture: Pictures, text: str, alarm: bool) -> Image.Image:
    above = Image.fromarray(picture)
    whole = Image.new("RGB", (above.width, above.height + _BAR), _ALARM if alarm else _PAPER)
    whole.paste(above, (0, 0))
    ImageDraw.Draw(whole).text((6, above.height + 5), text, fill=_PAPER if alarm else _INK)
    return whole
