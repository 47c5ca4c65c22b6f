"""Dashboard and playground in JupyterLab, moved by a browser as a learner would."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from lab_fixtures import idle, lab_page, needs_browser, until

from cpugrpo_edu.record.metrics import read_metrics

DASHBOARD = """\
from cpugrpo_edu.notebook.dashboard import train
train("runs/live", steps=(4, 2, 2), prompts_per_step=4, num_generations=4, max_completion=48,
      per_cell=2, fisher_examples=4, patience=0, threads=1)"""
PLAYGROUND = "from cpugrpo_edu.notebook.playground import playground\nplayground()"


def notebook(*sources):
    import nbformat

    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


@needs_browser
@pytest.mark.slow
def test_dashboard_and_playground_in_jupyterlab(tmp_path):
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("jupyterlab")
    import nbformat

    work = tmp_path / "work"
    work.mkdir()
    nbformat.write(notebook(DASHBOARD), work / "dashboard.ipynb")
    nbformat.write(notebook(PLAYGROUND), work / "playground.ipynb")
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    run = work / "runs" / "live"

    def steps():
        path = run / "metrics.jsonl"
        return len(read_metrics(path)) if path.exists() else 0

    with lab_page(work, tmp_path) as (page, address):

        def open_and_run(name):
            page.goto(f"{address}/lab/tree/{name}?reset")
            page.locator(".jp-Notebook .jp-CodeCell").first.click()
            idle(page)
            page.keyboard.press("Shift+Enter")

        # The dashboard: its run trains, stands still, goes on, stops, and is resumed.
        open_and_run("dashboard.ipynb")
        page.get_by_role("button", name="Pause").click()
        page.get_by_text("Paused; memory is kept").wait_for()
        standing = steps()
        time.sleep(3)
        assert steps() == standing and not (run / "record.json").exists()
        page.get_by_role("button", name="Continue").click()
        until(lambda: steps() > standing)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("saved. Press Resume to continue.").wait_for()
        assert not (run / "record.json").exists()
        page.screenshot(path=pictures / "dashboard-stopped.png")
        page.get_by_role("button", name="Resume").click()
        page.get_by_text("Complete. Report:").wait_for()
        assert [row["global_step"] for row in read_metrics(run / "metrics.jsonl")] == [*range(1, 9)]
        chart = page.locator("img[alt^='Line charts over 8 optimizer steps']")
        chart.wait_for()
        assert page.get_by_text("Sample completions").is_visible()
        page.screenshot(path=pictures / "dashboard.png")

        # The playground: the run just made against the bundled model.
        open_and_run("playground.ipynb")
        page.get_by_label("Model A").wait_for()
        assert page.get_by_label("Model A").input_value() == "bundled"
        page.get_by_label("Model B").fill("runs/live")
        page.get_by_label("Model B").press("Tab")
        page.get_by_label("Domain").select_option("lists")
        page.get_by_label("Difficulty").select_option("intermediate")
        page.get_by_role("button", name="Draw a problem").click()
        drawn = page.locator("textarea[placeholder], .widget-textarea textarea").first
        until(lambda: drawn.input_value() != "")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("needed, score").nth(1).wait_for()
        assert page.locator(".jp-OutputArea pre").count() >= 2
        page.screenshot(path=pictures / "playground.png")
        drawn.fill("Compute 2+3.")
        page.get_by_label("Answer").fill("5")
        page.get_by_label("Answer").press("Tab")
        page.get_by_role("button", name="Generate").click()
        until(lambda: page.get_by_text("needed, score").count() == 0)
        page.locator(".jp-OutputArea").get_by_text("tokens").nth(1).wait_for()
        page.screenshot(path=pictures / "playground-typed.png")
