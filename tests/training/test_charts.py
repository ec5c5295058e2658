"""The plotly figure, the widgets, and what they leave in the cell, tested without a kernel."""

import pytest

pytest.importorskip("anywidget")
pytest.importorskip("plotly")

import ipywidgets

from ununennium.training.charts import Charts, View
from ununennium.training.runlog import RunLog


def test_all_figures_share_one_library():
    first, second = (Charts(320).figure for _ in range(2))
    assert first._library == second._library
    assert max(len(str(value)) for value in second.get_state().values()) < 10_000
    library = ipywidgets.widgets.widget._instances[first._library]
    assert len(library.code) > 1_000_000
    library.close()
    assert Charts(320).figure._library != first._library


def test_names_of_classes_are_no_html_and_no_formulas():
    scores = {"val_IoU": [0.2, 0.3], "val_IoU/<b>Öl & Gas</b>": [0.2, 0.3]}
    log = RunLog(history=scores | {'val_IoU/"$x^2$"': [0.2, 0.3]})
    charts = Charts(320)
    charts.show(log)
    charts.show(log)
    names = [trace.name for trace in charts.figure.data if trace.yaxis == "y3"]
    assert names == ["mean", "&lt;b&gt;Öl &amp; Gas&lt;/b&gt;", '"&#36;x^2&#36;"']
    assert charts.figure.layout.annotations[2].text == "<b>IoU</b>"


def test_without_scores_their_panel_has_no_heading():
    log = RunLog(history={"train_loss": [0.2, 0.3]})
    charts = Charts(320)
    charts.show(log)
    assert "IoU" not in charts.figure.to_json()


def test_only_the_curves_of_steps_are_sent_within_an_epoch(monkeypatch):
    log = RunLog(history={"train_loss": [0.2, 0.3], "val_IoU": [0.2, 0.3]})
    charts = Charts(320)
    charts.show(log)
    sent = []
    figure = type(charts.figure)
    monkeypatch.setattr(
        figure, "_send_update_msg", lambda self, **data: sent.append(data["restyle_data"])
    )
    charts.show(log, epoch_is_new=False)
    names = {charts.figure.data[i].name for message in sent for i in range(len(message))}
    assert "mean" not in names


def test_a_click_without_an_action_does_nothing():
    view, clicks = View(["Stop"]), []
    view.buttons["Stop"].click()
    view.actions = {"Stop": lambda: clicks.append(1)}
    view.buttons["Stop"].click()
    view.actions = {}
    view.buttons["Stop"].click()
    assert clicks == [1]


def test_a_view_closes_all_of_its_widgets():
    Charts(320)  # makes the library, which stays
    before = set(ipywidgets.widgets.widget._instances)
    View(["Stop", "Pause"]).close()
    assert set(ipywidgets.widgets.widget._instances) == before
