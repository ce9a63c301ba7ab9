"""The filters as DSRL's released package runs them, its faults included: for reproducing what was published.

Source: ``pre_process_data`` of the package ``dsrl`` 0.1.0, and of its later source, where the steps' ``box`` is
"task"; for thin, the trajectory buffer of FSRL, by which the published episodes were collected. The same episodes
come out, in the same order and with the same arrays. What it does differently from ``filters.py``:

* Returns are float32 sums, and grids and strips are computed in float32.
* Density and thin give the highest value a cell of its own beyond the grid; where all values are equal, every
  episode has a cell of its own. Density's output is in the order of the cells. Both draw from Python's ``random``,
  which the package does not seed; here ``seed`` does.
* Candidates for outliers reach half of the published maxima, not of the data's.
* Inpaint's strip counts falsified episodes when it measures returns, and puts them back at the end if they fell.
* Inpaint's strip is a fraction of the range that the data had before density.
* Epsilon finds its side among all episodes but applies their positions to what inpaint has left, so it judges and
  drops others; where a position does not exist the package crashes, and here the error says so.
* Noise is drawn for observations and next observations independently, each with the deviation of its own array.
* All draws but density's and thin's are from PCG64 with the seed 1234, whatever the seed of the run.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput
from springhead.rl import filters
from springhead.rl.filter_arrays import take
from springhead.rl.filter_state import State, falsify, noisy
from springhead.rl.filters import Judgement, Positions

Singles = npt.NDArray[np.float32]
_SEED = 1234


class Released:
    """The released code's variables, beside the state in which the outcome is recorded.

    The order of the episodes in the state is that of ``left``.
    """

    def __init__(self, state: State, seed: int) -> None:
        self.state = state
        self.random = random.Random(seed)
        self.rng = np.random.Generator(np.random.PCG64(_SEED))
        self.drawn: Positions = np.arange(0)  # positions of the falsified, in the order of their draw
        self._sum_up()

    def _sum_up(self) -> None:
        data, at = self.state.data, self.state.at
        spans = list(zip(data.starts[at].tolist(), data.ends[at].tolist(), strict=True))
        # One sum per episode: NumPy's result depends on how many numbers it adds at once.
        self.returns: Singles = np.array([data.rewards[a:b].sum() for a, b in spans], dtype=np.float32)
        self.costs: Singles = np.array([data.costs[a:b].sum() for a, b in spans], dtype=np.float32)
        self.cost_range: tuple[Any, Any] = (self.costs.min(), self.costs.max())
        self.left = np.arange(len(at))

    def select(self, settings: filters.Ranges | filters.Thin) -> None:
        """What happened while episodes were collected; the rest begins with what is left."""
        state = self.state
        if isinstance(settings, filters.Ranges):
            for judgement in filters.ranges(state.returns, state.costs, settings):
                state.judge(replace(judgement, index=np.arange(len(state.at))))
        else:
            state.judge(self._thin(settings))
        self._sum_up()

    def _thin(self, settings: filters.Thin) -> Judgement:
        """Keeps the last episode of each cell, then the last left of cells drawn at random."""
        returns, costs, most = self.state.returns, self.state.costs, settings.max_episodes
        n, side = len(returns), int(np.ceil(np.sqrt(settings.max_episodes)))
        axes = [(x - x.min()) // ((x.max() - x.min()) / side) for x in (returns, costs) if x.max() > x.min()]
        cell: dict[tuple[float, ...], list[int]] = defaultdict(list)
        for number, key in enumerate(zip(*axes, strict=True) if axes else [()] * n):
            cell[key].append(number)
        order = [members.pop() for members in cell.values()]
        filled = [key for key, members in cell.items() if members]
        while len(order) < min(most, n):
            key = self.random.choice(filled)
            order.append(cell[key].pop())
            if not cell[key]:
                filled.remove(key)
        place = np.full(n, np.nan)
        place[order] = np.arange(1.0, len(order) + 1)
        rest = np.flatnonzero(np.isnan(place))
        place[rest] = np.arange(len(order) + 1.0, n + 1)
        threshold = np.full(n, float(most))
        return Judgement("thin", np.arange(n), place <= threshold, place, threshold)

    def density(self, settings: filters.Density) -> None:
        """Thins and empties cells, and puts what is left into the order in which its cells were first met."""
        task, n = self.state.task, len(self.returns)
        count, place, order = np.zeros(n), np.full(n, np.nan), []
        published = (task.cost_range, task.return_range) if settings.box == "task" else None
        for cell in filters.released_cells(self.costs, self.returns, settings, published):
            count[cell] = len(cell)
            kept = filters.thinned(cell, settings, self.random)
            ranked = list(dict.fromkeys([*kept, *cell]))
            place[ranked] = np.arange(1.0, len(ranked) + 1)
            if len(cell) > settings.min_per_cell:
                order += kept
        least, most = float(settings.min_per_cell), float(settings.max_per_cell)
        sparse = Judgement("density-sparse", np.arange(n), count > least, count, np.full(n, least))
        self.state.judge(sparse)
        stayed = sparse.survivors()
        place = place[stayed]
        crowded = Judgement("density-crowded", np.arange(len(stayed)), place <= most, place, np.full(len(stayed), most))
        ordered = np.array(order, dtype=np.intp)
        self.state.judge(crowded, np.searchsorted(stayed, ordered))
        self.returns, self.costs = self.returns[ordered], self.costs[ordered]
        self.left = np.arange(len(ordered))

    def outliers(self, settings: filters.Outliers) -> None:
        """Falsifies episodes drawn among those that reach half of the published maxima."""
        task, n = self.state.task, len(self.returns)
        number = max(1, int(n * settings.fraction))
        high = (self.costs >= task.cost_range[1] / 2) & (self.returns >= task.return_range[1] / 2)
        candidates = np.flatnonzero(high)
        filters.check_candidates(len(candidates), number, n, (task.cost_range[1], task.return_range[1]))
        self.drawn = self.rng.choice(candidates, size=number, replace=False)
        claimed = self.rng.choice(np.arange(int(settings.cost_limit)), size=number)
        lengths = (self.state.data.ends - self.state.data.starts)[self.state.at]
        claims = []
        for position, cost in zip(self.drawn.tolist(), claimed.tolist(), strict=True):
            if cost > lengths[position]:
                raise BadInput(
                    f"filter outliers: an episode of {lengths[position]} steps cannot claim a cost of {cost}, where "
                    "the released code crashes; lower the step's cost_limit or set rl.filter.released: false"
                )
            steps = self.rng.choice(np.arange(int(lengths[position])), cost, replace=False)
            claims.append((position, steps))
        value = np.full(n, np.nan)
        value[self.drawn] = np.arange(1.0, number + 1)
        kept = np.ones(n, dtype=bool)
        kept[self.drawn] = False
        falsify(self.state, Judgement("outliers", np.arange(n), kept, value, np.full(n, float(number))), claims)
        self.costs[self.drawn] = claimed
        self.returns[self.drawn] = 1.5 * self.returns[self.drawn]

    def inpaint(self, rectangles: Sequence[filters.Inpaint]) -> None:
        """Empties rectangles one after the other, then puts falsified episodes back."""
        back = np.arange(0)  # falsified episodes that fell, in the order of their draw
        for number, settings in enumerate(rectangles, start=1):
            low, high = self.cost_range if settings.box == "data" else self.state.task.cost_range
            returns, costs = self.returns[self.left], self.costs[self.left]
            strip = ((high - low) * settings.cost_from + low <= costs) & (
                costs <= (high - low) * settings.cost_to + low
            )
            if not strip.any():
                raise BadInput(
                    f"filter inpaint-{number}: no episode has a cost in the strip, where the released code crashes; "
                    "widen cost_from … cost_to or set rl.filter.released: false"
                )
            least, most = returns[strip].min(), returns[strip].max()
            span = most - least
            fallen = (
                strip
                & (span * settings.return_from + least <= returns)
                & (returns <= span * settings.return_to + least)
            )
            value = np.where(strip, (returns - least) / span if span else 0.0, np.nan).astype(np.float64)
            threshold = np.where(strip, settings.return_to, np.nan)
            planted = np.isin(self.left, self.drawn)
            judgement = Judgement(f"inpaint-{number}", np.arange(len(returns)), ~fallen | planted, value, threshold)
            now = np.concatenate([self.left, back])
            self.left = self.left[~fallen]
            back = np.array([i for i in self.drawn.tolist() if i not in set(self.left.tolist())], dtype=np.intp)
            self.state.judge(judgement, _places(now, np.concatenate([self.left, back])))
        self.left = np.concatenate([self.left, back])

    def epsilon(self, settings: filters.Epsilon) -> None:
        """Cuts the best episodes off one side, at positions that are right only if nothing was inpainted."""
        side = np.flatnonzero((self.costs <= settings.cost_limit) == (settings.epsilon > 0))
        if not len(side) or side[-1] >= len(self.left):
            why = "no episode is on its side of the limit" if not len(side) else "its positions exceed what is left"
            raise BadInput(
                f"filter epsilon: {why}, where the released code crashes; leave the step out or set "
                "rl.filter.released: false"
            )
        returns = self.returns[self.left[side]]
        bound = returns.max() - abs(settings.epsilon)
        value, threshold = np.full(len(self.left), np.nan), np.full(len(self.left), np.nan)
        value[side], threshold[side] = returns, bound
        kept = np.ones(len(self.left), dtype=bool)
        kept[side[returns >= bound]] = False
        judgement = Judgement("epsilon", np.arange(len(self.left)), kept, value, threshold)
        now, self.left = self.left, np.sort(self.left[kept])
        self.state.judge(judgement, _places(now, self.left))

    def noise(self, settings: filters.Noise) -> None:
        """Adds noise to observations, then other noise to next observations."""
        data = take(self.state.data, self.state.at)
        made, deviations = [], []
        for array in (data.observations, data.next_observations):
            deviation = np.std(array)
            with_noise = array.copy()
            with_noise += settings.scale * self.rng.normal(0, deviation, array.shape)
            made.append(with_noise)
            deviations.append(settings.scale * float(deviation))
        noisy(self.state, replace(data, observations=made[0], next_observations=made[1]), deviations[0])


def _places(now: Positions, wanted: Positions) -> Positions:
    """Where in ``now``, which has no number twice, each wanted number is."""
    order = np.argsort(now)
    found: Positions = order[np.searchsorted(now[order], wanted)]
    return found


def run(state: State, steps: Sequence[Any], seed: int) -> None:
    """Runs steps, which are in the released order.

    Args:
        state: What is left, and what was decided.
        steps: Settings of the rules, as in ``filters.py``.
        seed: Seeds Python's generator.

    Raises:
        BadInput: Where the released code crashes, or a rule leaves nothing.
    """
    released = Released(state, seed)
    rectangles = [settings for settings in steps if isinstance(settings, filters.Inpaint)]
    for settings in steps:
        match settings:
            case filters.Ranges() | filters.Thin():
                released.select(settings)
            case filters.Density():
                released.density(settings)
            case filters.Outliers():
                released.outliers(settings)
            case filters.Inpaint() if settings is rectangles[0]:
                released.inpaint(rectangles)
            case filters.Epsilon():
                released.epsilon(settings)
            case filters.Noise():
                released.noise(settings)
