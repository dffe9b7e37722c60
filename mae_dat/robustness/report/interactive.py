"""Interactive charts of a report as Vega-Lite specifications, from rows of numbers alone.

The page embeds them with the Vega bundle in `vega/`, so that they need no server and no network. Every specification
uses the fixed field names below, so that no text of the results becomes part of an expression.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mae_dat.robustness.report.charts import COLORS, GREY

Spec = dict[str, Any]
"""A Vega-Lite specification, without its schema's address."""
Rows = Sequence[Mapping[str, Any]]
ROW_HEIGHT = 22
POINT_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
USUAL_ORDER, BY_NAME, LARGEST_FIRST, SMALLEST_FIRST = "usual order", "name", "largest first", "smallest first"
_ERROR_COLORS, _DIFFERENCE_COLORS = "blues", "brownbluegreen"


def interval_dots(rows: Rows, groups: Sequence[str], axis: str, zero: bool = False) -> Spec:
    """Return dots with intervals, a line for each `name`, coloured by `group`.

    A row has name, group, value, low, high and text, which the tooltip shows.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    x = {"field": "value", "type": "quantitative", "title": axis, "scale": {"zero": False}}
    y = {"field": "name", "type": "nominal", "sort": names, "title": None, "axis": {"grid": True, "tickBand": "extent"}}
    common = {"y": y, "color": _color(groups), "yOffset": {"field": "group", "type": "nominal", "sort": list(groups)}}
    ends = {"x": {**x, "field": "low"}, "x2": {"field": "high"}}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": {**common, **ends}},
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {**common, "x": x, "shape": _shape(groups), "tooltip": _tooltip("name", "group", "text")},
        },
    ]
    if zero:
        layers.insert(0, {"mark": {"type": "rule", "color": GREY}, "encoding": {"x": {"datum": 0}}})
    height = max(60, round(len(names) * (10 + 12 * len(groups))))
    return {"data": {"values": list(rows)}, "height": height, "layer": layers}


def interval_lines(rows: Rows, groups: Sequence[str], axes: tuple[str, str], choices: Sequence[str] = ()) -> Spec:
    """Return lines with intervals over `position`, coloured by `group`; with `choices`, of the selected `choice`.

    A row has choice, group, position, value, low, high and text.
    """
    x = {"field": "position", "type": "quantitative", "title": axes[0], "axis": {"tickMinStep": 1, "grid": False}}
    y = {"field": "value", "type": "quantitative", "title": axes[1], "scale": {"zero": False}}
    common = {"x": x, "color": _color(groups)}
    spec: Spec = {
        "data": {"values": list(rows)},
        "height": 260,
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.16},
                "encoding": {**common, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {"mark": "line", "encoding": {**common, "y": y}},
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {
                    **common,
                    "y": y,
                    "shape": _shape(groups),
                    "tooltip": _tooltip("choice", "group", "position", "text"),
                },
            },
        ],
    }  # fmt: skip
    return _selected(spec, "choice", choices, "Show")


def heat_cells(rows: Rows, choices: Sequence[str], axes: tuple[str, str], difference: float | None = None) -> Spec:
    """Return cells of `name` x `column` with numbers, of the selected `choice`, sorted as the reader chooses.

    A row has choice, name, column, value, label, text, usual and alphabetical (positions of the name) and mean (of its
    row of cells). Colours are for errors from 0 to 100 %, or for differences from -`difference` to `difference`, where
    less is green.
    """
    order = (
        f"order == '{USUAL_ORDER}' ? datum.usual : order == '{BY_NAME}' ? datum.alphabetical : "
        f"order == '{LARGEST_FIRST}' ? -datum.mean : datum.mean"
    )
    scale: Spec = {"domain": [0, 100], "scheme": _ERROR_COLORS}
    is_dark = "datum.value > 60"
    if difference is not None:
        scale = {"domain": [-difference, 0, difference], "scheme": _DIFFERENCE_COLORS, "reverse": True}
        is_dark = f"abs(datum.value) > {0.6 * difference}"
    names = len({row["name"] for row in rows})
    x = {"field": "column", "type": "ordinal", "title": axes[1], "axis": {"labelAngle": 0, "domain": False}}
    y = {
        "field": "name",
        "type": "nominal",
        "title": None,
        "sort": {"field": "key", "op": "min"},
        "axis": {"domain": False},
    }
    spec: Spec = {
        "data": {"values": list(rows)},
        "height": ROW_HEIGHT * max(2, names),
        "transform": [{"calculate": order, "as": "key"}],
        "encoding": {
            "x": x,
            "y": y,
            "tooltip": _tooltip("name", "column", "text", titles={"name": axes[0], "column": axes[1]}),
        },
        "layer": [
            {
                "mark": {"type": "rect", "cornerRadius": 2},
                "encoding": {
                    "color": {"field": "value", "type": "quantitative", "legend": None, "scale": scale},
                },
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "text": {"field": "label"},
                    "color": {"condition": {"test": is_dark, "value": "white"}, "value": "#1c1e21"},
                },
            },
        ],
    }
    orders = [USUAL_ORDER, BY_NAME, LARGEST_FIRST, SMALLEST_FIRST]
    spec = _selected(spec, "choice", choices, "Show")
    spec.setdefault("params", []).append(_select("order", orders, "Sort by"))
    return spec


def confusion_cells(rows: Rows, choices: Sequence[str], classes: Sequence[str]) -> Spec:
    """Return a confusion matrix of shares, of the selected `choice`.

    A row has choice, label, prediction, share (of the label's images, in percent) and text.
    """
    axis = {"domain": False, "labelLimit": 110}
    x = {"field": "prediction", "type": "nominal", "sort": list(classes), "title": "predicted"}
    y = {"field": "label", "type": "nominal", "sort": list(classes), "title": "class", "axis": axis}
    spec: Spec = {
        "data": {"values": list(rows)},
        "height": max(120, ROW_HEIGHT * len(classes)),
        "mark": {"type": "rect", "cornerRadius": 2},
        "encoding": {
            "x": {**x, "axis": {**axis, "labelAngle": -60, "labelLimit": 80}},
            "y": y,
            "color": {
                "field": "share",
                "type": "quantitative",
                "legend": {"title": "%", "orient": "top", "gradientLength": 120},
                "scale": {"domain": [0, 100], "scheme": _ERROR_COLORS},
            },
            "tooltip": _tooltip("label", "prediction", "text"),
        },
    }
    return _selected(spec, "choice", choices, "Show")


def reliability_lines(rows: Rows, groups: Sequence[str]) -> Spec:
    """Return a reliability diagram: accuracy against confidence with intervals, and the diagonal.

    A row has group, position (mean confidence, %), value, low, high (accuracy, %), images and text.
    """
    x = {"field": "position", "type": "quantitative", "title": "confidence (%)", "scale": {"domain": [0, 100]}}
    y = {"field": "value", "type": "quantitative", "title": "accuracy (%)", "scale": {"domain": [0, 100]}}
    common = {"x": x, "color": _color(groups)}
    diagonal = {
        "data": {"values": [{"position": 0, "value": 0}, {"position": 100, "value": 100}]},
        "mark": {"type": "line", "strokeDash": [4, 4], "color": GREY},
        "encoding": {"x": x, "y": y},
    }
    ends = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    size = {"field": "images", "type": "quantitative", "title": "images", "scale": {"range": [20, 300]}, "legend": None}
    return {
        "data": {"values": list(rows)},
        "height": 320,
        "layer": [
            diagonal,
            {"mark": {"type": "rule", "strokeWidth": 1.2}, "encoding": {**common, **ends}},
            {"mark": {"type": "line", "opacity": 0.7}, "encoding": {**common, "y": y}},
            {
                "mark": {"type": "point", "filled": True, "opacity": 0.9},
                "encoding": {
                    **common,
                    "y": y,
                    "size": size,
                    "shape": _shape(groups),
                    "tooltip": _tooltip("group", "text"),
                },
            },
        ],
    }


def _color(groups: Sequence[str]) -> Spec:
    colors = [COLORS[number % (len(COLORS) - 1)] for number in range(len(groups))]
    legend = (
        {"title": None, "orient": "top", "columns": 2, "labelLimit": 170, "symbolOpacity": 1}
        if len(groups) > 1
        else None
    )
    return {
        "field": "group",
        "type": "nominal",
        "sort": list(groups),
        "scale": {"domain": list(groups), "range": colors},
        "legend": legend if len(groups) > 1 else None,
    }


def _shape(groups: Sequence[str]) -> Spec:
    shapes = [POINT_SHAPES[number % len(POINT_SHAPES)] for number in range(len(groups))]
    return {**_color(groups), "scale": {"domain": list(groups), "range": shapes}}


def _tooltip(*fields: str, titles: Mapping[str, str] | None = None) -> list[Spec]:
    usual = {"name": "of", "group": "model", "text": "value", "position": "at", "choice": "shown", "label": "class"}
    return [{"field": field, "title": (titles or {}).get(field, usual.get(field, field))} for field in fields]


def _selected(spec: Spec, field: str, choices: Sequence[str], title: str) -> Spec:
    """Return a chart of the rows whose field is the choice of a menu; of all rows for fewer than two choices."""
    if len(choices) < 2:
        return spec
    transform = [{"filter": f"datum.{field} == {field}"}, *spec.get("transform", [])]
    return {**spec, "transform": transform, "params": [_select(field, choices, title)]}


def _select(name: str, options: Sequence[str], title: str) -> Spec:
    return {
        "name": name,
        "value": options[0],
        "bind": {"input": "select", "options": list(options), "name": f"{title} "},
    }
