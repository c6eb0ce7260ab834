"""How each chart is drawn: Vega-Lite specifications without their data, which the page's script fills in.

Texts and axes take the colour of the page (``currentColor``), so that one drawing serves light, dark and paper.
Vega-Lite 6, https://vega.github.io/vega-lite/docs/.
"""

from __future__ import annotations

from typing import Any

from msplora_analysis.show.drawing.colours import ON_SCREEN, SEQUENTIAL

Spec = dict[str, Any]

DASHES: tuple[list[int], ...] = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 3])
"""So that lines stay apart without colour. 5 and the 6 colours share no factor: 30 combinations."""

CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "view": {"stroke": "currentColor", "strokeOpacity": 0.25},
    "axis": {
        **dict.fromkeys(("labelColor", "titleColor", "domainColor", "tickColor", "gridColor"), "currentColor"),
        **{"gridOpacity": 0.15, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelFontSize": 12, "titleFontSize": 12},
        **{"titleFontWeight": "normal", "labelOverlap": True},
    },
    "legend": {
        **dict.fromkeys(("labelColor", "titleColor"), "currentColor"),
        **{"orient": "top", "gradientLength": 180, "gradientThickness": 10, "titleFontWeight": "normal"},
        **{"labelFontSize": 12, "titleFontSize": 12, "titleLimit": 320},
    },
    "title": {"color": "currentColor", "fontSize": 13, "fontWeight": 600, "anchor": "start"},
    "aria": False,  # the element around it has the description
}


def line_style(index: int) -> tuple[str, list[int]]:
    """Colour and dashes of the line number ``index``."""
    return ON_SCREEN[index % len(ON_SCREEN)], DASHES[index % len(DASHES)]


def lines(axis: str, value: str, labels: list[str], *, shared: bool = False) -> Spec:
    """A line for each run over the checkpoints. Rows: run (its number), label, shown (the run's name), when, value.

    shared: the axis reaches from 0 to the signal ``most``, so that panels beside each other can be compared.
    """
    colours, dashes = zip(*(line_style(index) for index in range(len(labels))), strict=True)
    ticks: Spec = {"tickMinStep": 1, "format": "~s", "grid": False}
    x = {"field": "when", "type": "quantitative", "title": axis, "axis": ticks}
    y = {"field": "value", "type": "quantitative", "title": None, "axis": {"tickCount": 5, "format": ".3~g"}}
    y["scale"] = {"domainMin": 0, "domainMax": {"expr": "most"}} if shared else {"zero": False, "nice": True}
    common = {"x": x, "y": y, "detail": {"field": "run", "type": "nominal"}}
    style = {
        channel: {"field": "label", "type": "nominal", "legend": None, "scale": {"domain": labels, "range": looks}}
        for channel, looks in (("color", colours), ("strokeDash", dashes))
    }
    tooltip = [
        {"field": "shown", "type": "nominal", "title": "run"},
        {"field": "when", "type": "quantitative", "title": axis, "format": ".4~g"},
        {"field": "value", "type": "quantitative", "title": value, "format": ".4~g"},
    ]
    line = {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**common, **style}}
    dot = {"mark": {"type": "point", "filled": True, "size": 22}, "encoding": {**common, "color": style["color"]}}
    # Large and not seen: what a pointer or finger can hit.
    target = {
        "mark": {"type": "point", "filled": True, "size": 250, "opacity": 0},
        "encoding": {**common, "tooltip": tooltip},
    }
    spec: Spec = {"data": {"name": "rows"}, "width": "container", "height": 200, "layer": [line, dot, target]}
    return spec | ({"params": [{"name": "most", "value": 1}]} if shared else {})


def cells(
    x: tuple[str, str],
    y: tuple[str, str],
    value: str,
    tooltip: list[tuple[str, str]],
    *,
    step: int = 16,
    square: bool = False,
    texts: bool = False,
    lowest: float = 0,
) -> Spec:
    """A heat map. Rows: the fields of ``x``, ``y`` and ``tooltip`` (name, title), value (or null: left blank).

    The colours reach from ``lowest`` to the signal ``most``. square: as high as a matrix is wide, else ``step`` pixels
    a row, which the script sees to. texts: the value in each cell too.
    """
    spec: Spec = {
        "data": {"name": "rows"},
        "params": [{"name": "most", "value": 1}],
        "width": "container",
        "height": 360,
        "autosize": {"type": "fit" if square else "fit-x", "contains": "padding"},
        "usermeta": {"step": None if square else step, "rows": y[0]},
        "encoding": {
            "x": {"field": x[0], "type": "ordinal", "sort": None, "title": x[1], "axis": {"labelAngle": 0}},
            "y": {"field": y[0], "type": "ordinal", "sort": None, "title": y[1]},
        },
    }
    colour = {
        "field": "value",
        "type": "quantitative",
        "title": value,
        "scale": {"scheme": SEQUENTIAL, "domainMin": lowest, "domainMax": {"expr": "most"}},
        "legend": {"format": ".3~g", "tickCount": 4},
    }
    blank = {"test": "!isValid(datum.value)", "value": "transparent"}
    shown = [{"field": name, "title": title, "type": "nominal"} for name, title in tooltip]
    shown.append({"field": "value", "title": value, "type": "quantitative", "format": ".4~g"})
    rect = {
        "mark": {"type": "rect", "invalid": None},
        "encoding": {"color": {"condition": blank, **colour}, "tooltip": shown},
    }
    # Viridis is dark below its middle and light above.
    ink = {"condition": {"test": f"datum.value > {lowest} + (most - {lowest}) * 0.6", "value": "#111"}, "value": "#fff"}
    text = {
        "mark": {"type": "text", "fontSize": 11},
        "encoding": {"text": {"field": "value", "type": "quantitative", "format": ".3~g"}, "color": ink},
    }
    return {**spec, "layer": [rect, text] if texts else [rect]}
