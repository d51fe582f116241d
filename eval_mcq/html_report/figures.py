"""The plots of a report, with matplotlib: SVG that follows the page's colors, and files for papers."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval_mcq.html_report.content import Content
from eval_mcq.html_report.models import TrainingCurve
from eval_mcq.items.schema import LETTERS
from eval_mcq.tables.calibration import BINS
from eval_mcq.tables.results import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#7a7a7a", "#0072b2", "#d55e00", "#009e73", "#a3578a", "#8c6d1f")
"""Colors of the arms in order, safe for color-blind readers (after Okabe and Ito) and legible on white and black."""

WIDTH = 5.6
"""Width of most plots, inches: their text is legible in half a page, and on a telephone."""

DASHES = ("-", "--", ":", "-.")
"""Line styles of an arm's curves."""


@dataclass(frozen=True)
class Ink:
    """Colors of text and lines."""

    text: str
    line: str


ON_WHITE = Ink("#1a1a1a", "#c8c8c8")
IN_PAGE = Ink("#010203", "#040506")
"""Placeholders: `page_svg` replaces them by the page's own colors, so that a plot follows its dark mode."""

STRONGEST = 0.6
"""Opacity that a share of 1 adds to a cell of the confusion plot; text in either color scheme is legible on it."""

MOST_CONFUSED = 12
"""Maximum number of options in the confusion plot; rarer ones are collected under OTHER."""
OTHER = "(other)"
UNPARSED = "(unparsed)"


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: File name without suffix.
        title: Heading.
        caption: What it shows, also as text for screen readers.
        figure: The matplotlib figure.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"

    def svg(self) -> str:
        """Render as an ``svg`` element, with real text."""
        import matplotlib

        stream = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        text = stream.getvalue()
        return text[text.index("<svg") :]

    def png(self) -> bytes:
        """Render as a PNG file on white."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=200, facecolor="white")
        return stream.getvalue()


def page_svg(plot: Plot) -> str:
    """Render a plot made with `IN_PAGE` in the page's colors."""
    return plot.svg().replace(IN_PAGE.text, "var(--ink)").replace(IN_PAGE.line, "var(--line)")


def plots(
    content: Content, comparison: Comparison, curves: Sequence[TrainingCurve], ink: Ink
) -> tuple[list[Plot], list[Plot]]:
    """Create all plots of a report, in the given colors: those of the results, and those of the trainings."""
    import matplotlib

    with matplotlib.rc_context(_settings(ink)):
        drawn = [_accuracy(comparison, ink), _dots(comparison, ink)]
        if any(arm.diagnosis.calibration for arm in comparison.arms):
            drawn.append(_reliability(comparison, ink))
        results = [*drawn, *(_confusion(content, name, ink) for name in content.arms)]
        together: dict[tuple[str, str], list[TrainingCurve]] = {}
        for curve in curves:
            together.setdefault((curve.value, curve.title), []).append(curve)
        return results, [_training(of_one, list(content.arms)) for of_one in together.values()]


def _settings(ink: Ink) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), ink.text),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), ink.line),
    }


def _training(curves: Sequence[TrainingCurve], names: Sequence[str]) -> Plot:
    title, value = curves[0].title, curves[0].value
    figure, axes = _canvas(WIDTH, 3.6)
    axes.grid(visible=True, linewidth=0.5)
    drawn: Counter[int] = Counter()
    for curve in curves:
        first = curve.arms[0]
        axes.plot(
            *zip(*curve.points, strict=True),
            color=_color(first),
            linestyle=DASHES[drawn[first] % len(DASHES)],
            marker="." if len(curve.points) < 50 else "",
            label="; ".join(names[arm] for arm in curve.arms),
        )
        drawn[first] += 1
    axes.set_xlabel("step")
    axes.set_ylabel(value)
    _legend(axes, 3)
    return Plot(
        f"{value}-{_file_name(title)}",
        f"Training {value}: {title}",
        f"The {value} over the optimizer steps of the training. Arms whose models have the same training share a line.",
        figure,
    )


def _accuracy(comparison: Comparison, ink: Ink) -> Plot:
    names = comparison.categories
    figure, axes = _canvas(WIDTH, 0.6 + len(names) * (0.2 + 0.16 * len(comparison.arms)))
    height = 0.8 / len(comparison.arms)
    for a, arm in enumerate(comparison.arms):
        cells = [arm.cells[name] for name in names]
        shares = np.array([100 * cell.share for cell in cells])
        errors = [
            [max(0.0, share - 100 * cell.interval.low) for share, cell in zip(shares, cells, strict=True)],
            [max(0.0, 100 * cell.interval.high - share) for share, cell in zip(shares, cells, strict=True)],
        ]
        places = np.arange(len(names)) + (a - (len(comparison.arms) - 1) / 2) * height
        axes.barh(places, shares, height * 0.9, color=_color(a), label=arm.name)
        axes.errorbar(shares, places, xerr=errors, fmt="none", ecolor=ink.text, elinewidth=0.9, capsize=1.5)
    for i, name in enumerate(names):
        chance = 100 * comparison.chance[name]
        axes.plot([chance, chance], [i - 0.45, i + 0.45], color=ink.text, linewidth=1, linestyle=":")
    _rows(axes, [f"{name} ({comparison.arms[0].cells[name].n})" for name in names])
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in %; dotted: chance")
    _legend(axes)
    return Plot(
        "accuracy",
        "Accuracy by disease",
        "Accuracy of every arm on every disease (number of questions in brackets) with 95 % score intervals; a "
        "dotted line marks the accuracy of guessing. The table has the same values.",
        figure,
    )


def _dots(comparison: Comparison, ink: Ink) -> Plot:
    names = [*comparison.categories, "Average"]
    figure, axes = _canvas(WIDTH, 0.9 + 0.3 * len(names))
    shares = [
        [*(100 * arm.cells[name].share for name in comparison.categories), 100 * arm.macro.value]
        for arm in comparison.arms
    ]
    for i in range(len(names)):
        values = [of_arm[i] for of_arm in shares]
        axes.plot([min(values), max(values)], [i, i], color=ink.line, linewidth=3, zorder=1)
    for a, (arm, values) in enumerate(zip(comparison.arms, shares, strict=True)):
        axes.scatter(values, range(len(names)), color=_color(a), s=38, label=arm.name, zorder=2)
    _rows(axes, names)
    axes.axhline(len(names) - 1.5, color=ink.line, linewidth=0.8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in %")
    _legend(axes)
    return Plot(
        "dots",
        "From arm to arm",
        "The same accuracies as dots on one line per disease, which shows the change between arms; the last line is "
        "the macro average.",
        figure,
    )


def _reliability(comparison: Comparison, ink: Ink) -> Plot:
    figure, axes = _canvas(4.6, 4.2)
    axes.plot([0, 100], [0, 100], color=ink.line, linewidth=1)
    for a, arm in enumerate(comparison.arms):
        if (found := arm.diagnosis.calibration) is None:
            continue
        filled = [place for place in found.bins if place.n]
        x = [100 * place.confidence for place in filled]
        y = [100 * place.accuracy for place in filled]
        counts = np.array([place.n for place in filled])
        axes.plot(x, y, color=_color(a), linewidth=1, label=f"{arm.name} (ECE {100 * found.ece:.1f})")
        axes.scatter(x, y, s=10 + 90 * counts / counts.max(), color=_color(a))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_aspect("equal")
    axes.set_xlabel("probability of the chosen option in %")
    axes.set_ylabel("right in %")
    _legend(axes, 2)
    return Plot(
        "reliability",
        "Reliability",
        f"Accuracy of the answers against their predicted probability, in {BINS} bins; the area of a dot is the "
        "number of answers in its bin. A calibrated model is on the diagonal; the expected calibration error (ECE, "
        "in %) is the mean distance from it.",
        figure,
    )


def _confusion(content: Content, arm: str, ink: Ink) -> Plot:
    pairs: Counter[tuple[str, str]] = Counter()
    answers = {answer.id: answer for answer in content.arms[arm].answers}
    for item in content.items:
        letter = answers[item.id].chosen
        chosen = item.options[LETTERS.index(letter)] if letter else UNPARSED
        pairs[item.options[item.answer], chosen] += 1
    weight: Counter[str] = Counter()
    for (true, chosen_text), n in pairs.items():
        weight[true] += n
        weight[chosen_text] += n
    kept = [name for name, _ in weight.most_common(MOST_CONFUSED)]
    names = [*sorted(kept), *([OTHER] if len(weight) > len(kept) else [])]
    place = {name: names.index(name) if name in names else len(names) - 1 for name in weight}
    counts = np.zeros((len(names), len(names)))
    for (true, chosen_text), n in pairs.items():
        counts[place[true], place[chosen_text]] += n
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.36 * len(names)
    figure, axes = _canvas(side + 0.6, side)
    axes.grid(visible=False)
    color = _color(list(content.arms).index(arm))
    for i, j in zip(*np.nonzero(counts), strict=True):
        axes.add_patch(_square(int(j), int(i), color, float(share[i, j])))
        axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=7, color=ink.text)
    axes.set_xlim(-0.5, len(names) - 0.5)
    _rows(axes, names)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_xlabel("chosen")
    axes.set_ylabel("true")
    return Plot(
        f"confusion-{_file_name(arm)}",
        f"Confusion: {arm}",
        f"Number of questions by the option that {arm} chose (columns) and the true option (rows); the stronger a "
        "cell's color, the larger its share of the row. Only options offered together can be confused.",
        figure,
    )


def _file_name(title: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in title)


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, axis="x", linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _legend(axes: "Axes", columns: int = 3) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False)


def _square(x: int, y: int, color: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, alpha=0.1 + STRONGEST * alpha, linewidth=0)


def _color(arm: int) -> str:
    return PALETTE[arm % len(PALETTE)]
