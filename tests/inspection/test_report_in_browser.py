"""The HTML report in Chromium: what a reader clicks and types, and that nothing goes wrong meanwhile."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import (
    deep_inspection,
    failing_inspection,
    hostile_inspection,
    measured_inspection,
    unrecorded_inspection,
)

from mixq_compile.inspection.blast_radius import touches
from mixq_compile.inspection.html import save_html

playwright_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright_api.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
MAKERS = {
    "llama": measured_inspection,
    "failing": failing_inspection,
    "unrecorded": unrecorded_inspection,
    "hostile": hostile_inspection,
    "deep": deep_inspection,
}
FLUID = 300
"""Milliseconds that a main action may take."""
ATTEMPTS = 6
QUERY = "model.layers.0.self_attn.q_proj"
ALL_QUERIES = "model.layers.*.self_attn.q_proj"

# What a click does until the page has been drawn again.
TIMED_CLICK = """async (target) => {
  const started = performance.now();
  target.click();
  await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn, 0)));
  return performance.now() - started;
}"""


# The marks of each layer's row, by layer.
MATRIX = """() => {
  const textOf = (part) => part.textContent;
  const markOf = (cell) => [...cell.querySelectorAll("span")].map(textOf).join(" ");
  const rows = [...document.querySelectorAll(".matrix tbody tr:not(.group)")];
  const marksOf = (row) => [...row.querySelectorAll("td.by-pass")].map(markOf);
  return Object.fromEntries(rows.map((row) => [textOf(row.querySelector(".link")), marksOf(row)]));
}"""

# By how many pixels the longest line is too long.
OVERFLOW = """() => Math.max(
  ...[...document.querySelectorAll(".line code")].map((code) => code.scrollWidth - code.clientWidth),
)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


class Reader:
    """A reader of one report, who notes what the browser complains about."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page = page
        self.path = path
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("request", lambda request: self._note_request(request.url))

    def _note_request(self, url: str) -> None:
        if not url.startswith(f"file://{self.path}"):
            self.complaints.append(f"it asked for {url}")

    def open(self, fragment: str = "") -> "Reader":
        self.page.goto(f"file://{self.path}{fragment}")
        expect(self.passes.first).to_be_visible()
        return self

    @property
    def passes(self) -> Any:
        return self.page.locator("#pass-list .pass")

    @property
    def view(self) -> Any:
        return self.page.locator("#view")

    @property
    def card(self) -> Any:
        return self.page.get_by_role("complementary", name="Node")

    def choose_pass(self, number: int) -> None:
        self.page.locator(f"#pass-list [data-pass='{number}']").click()

    def choose_view(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def current(self) -> dict[str, str]:
        """The state in the address."""
        return self.page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")

    def lines(self, kind: str) -> Any:
        return self.view.locator(f".line.{kind}")


@pytest.fixture
def read(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens a report of this name at this fragment; afterwards nothing was complained about."""
    readers: list[Reader] = []

    def open_report(name: str, fragment: str = "", **options: Any) -> Reader:
        path = folder / f"{name}.html"
        if not path.exists():
            save_html(MAKERS[name](), path)
        options = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light", **options}
        readers.append(Reader(browser.new_page(**options), path))
        return readers[-1].open(fragment)

    yield open_report
    for reader in readers:
        reader.page.close()
    assert [reader.complaints for reader in readers] == [[] for _ in readers]


def number_of(pass_name: str) -> int:
    (graph,) = measured_inspection().graphs
    return next(record.index for record in graph.history.records if record.spec.startswith(pass_name))


REWRITE = "rewrite-mixed-linear"


def test_the_header_names_the_model_and_totals(read: Any) -> None:
    header = read("llama").page.locator("#header")
    expect(header.get_by_role("heading", name="a small llama")).to_be_visible()
    expect(header).to_contain_text("input_ids int64[2, 6]")
    expect(header).to_contain_text("14 of 15")
    expect(header).to_contain_text("a note")


def test_passes_without_changes_are_hidden_until_asked_for(read: Any) -> None:
    reader = read("llama")
    (graph,) = measured_inspection().graphs
    consequential = [record for record in graph.history.records if record.diff]
    assert reader.passes.count() == 1 + len(consequential)
    expect(reader.passes.first).to_contain_text("captured")
    expect(reader.page.locator("#hidden-count")).to_have_text(
        str(len(graph.history.records) - len(consequential))
    )
    reader.page.get_by_label("Hide the inconsequential").uncheck()
    assert reader.passes.count() == 1 + len(graph.history.records)


def test_passes_are_filtered_by_name(read: Any) -> None:
    reader = read("llama", "#pass=0")
    reader.page.get_by_label("Filter passes").fill("rewrite linear")
    assert reader.passes.count() == 2
    expect(reader.passes.last).to_contain_text(REWRITE)


def test_clicking_a_pass_shows_its_changes(read: Any) -> None:
    reader = read("llama", "#view=changes")
    reader.choose_pass(number_of(REWRITE))
    expect(reader.view.get_by_role("heading")).to_contain_text(REWRITE)
    expect(reader.lines("added").first).to_contain_text("get_attr")
    assert reader.current()["pass"] == str(number_of(REWRITE))


def test_the_captured_graph_is_shown_whole(read: Any) -> None:
    reader = read("llama", "#pass=0&view=changes")
    expect(reader.view).to_contain_text("222 nodes")


def test_changes_are_filtered_by_layer(read: Any) -> None:
    reader = read("llama", f"#view=changes&pass={number_of('canonicalize')}")
    expect(reader.lines("note").first).to_be_visible()
    reader.page.get_by_label("Filter by layer").fill("lm_head")
    expect(reader.lines("note")).to_have_count(1)
    reader.page.get_by_label("Filter by layer").fill("model.layers.*.q_proj")
    expect(reader.lines("note")).to_have_count(2)
    reader.page.get_by_label("Filter by layer").fill("no such layer")
    expect(reader.view).to_contain_text("changed nothing in no such layer")


def test_a_gap_opens(read: Any) -> None:
    reader = read("llama", f"#view=changes&pass={number_of('canonicalize')}&layer=lm_head")
    gap = reader.view.locator(".line-gap button").first
    expect(gap).to_contain_text("in other layers")
    gap.click()
    expect(reader.view.locator(".line-number").first).to_have_text("1")


def test_the_patch_switches_to_side_by_side(read: Any) -> None:
    reader = read("llama", f"#view=changes&pass={number_of('fuse-epilogue')}")
    expect(reader.view.locator(".pair")).to_have_count(0)
    reader.page.get_by_role("button", name="Side by side").click()
    expect(reader.view.locator(".pair").first).to_be_visible()
    expect(reader.page.get_by_role("button", name="Side by side")).to_have_attribute("aria-pressed", "true")
    reader.page.keyboard.press("t")
    expect(reader.view.locator(".pair")).to_have_count(0)


def test_the_node_at_the_top_stays_when_the_form_changes(read: Any) -> None:
    reader = read("llama", f"#view=changes&pass={number_of('fuse-epilogue')}")
    reader.page.evaluate("document.getElementById('view').scrollTop = 900")
    top = """() => {
      const height = document.querySelector(".view-head").getBoundingClientRect().bottom + 1;
      return document.elementsFromPoint(500, height).find((part) => part.matches(".line")).textContent;
    }"""
    before = reader.page.evaluate(top)
    reader.page.keyboard.press("t")
    assert before[8:20] in reader.page.evaluate(top)


def test_the_focus_stays_where_it_was(read: Any) -> None:
    reader = read("llama", "#view=layers")
    reader.page.get_by_role("button", name=f"Expand {ALL_QUERIES}").focus()
    reader.page.keyboard.press("Enter")
    expect(reader.page.get_by_role("button", name=f"Collapse {ALL_QUERIES}")).to_be_focused()
    reader.passes.nth(2).focus()
    reader.page.keyboard.press("Enter")
    expect(reader.passes.nth(2)).to_be_focused()


def test_differing_parts_of_a_changed_line_are_marked(read: Any) -> None:
    reader = read("llama", f"#view=changes&pass={number_of('fuse-epilogue')}")
    changed = reader.lines("removed").filter(has=reader.page.locator(".differs")).first
    expect(changed.locator(".differs")).to_have_text(["%dequantize_default"])


def test_a_node_opens_its_card(read: Any) -> None:
    reader = read("llama", f"#view=program&pass={number_of('select-kernels')}&node=mixed_linear_default")
    expect(reader.card.get_by_role("heading", level=2)).to_have_text("mixed_linear_default")
    expect(reader.card).to_contain_text(QUERY)
    expect(reader.card).to_contain_text(f"{REWRITE}fuse-epilogue")
    expect(reader.card).to_contain_text(f"created by {number_of('fuse-epilogue')} fuse-epilogue")
    expect(reader.card).to_contain_text("mixq::mixed_linear by ref")
    expect(reader.card).to_contain_text('"role": "q"')
    reader.card.locator("[data-node=getitem]").first.click()
    expect(reader.card.get_by_role("heading", level=2)).to_have_text("getitem")
    expect(reader.view.locator(".token-name.chosen")).to_have_text("getitem")
    reader.page.keyboard.press("Escape")
    expect(reader.card).to_be_hidden()


def test_the_card_of_a_removed_node_says_so(read: Any) -> None:
    reader = read("llama", f"#view=program&pass={number_of(REWRITE)}&node=linear")
    expect(reader.card).to_contain_text(f"Removed by pass {number_of(REWRITE)}")
    expect(reader.card).to_contain_text("aten.linear.default")


def test_a_shared_link_restores_what_was_shown(read: Any) -> None:
    number = number_of("fuse-epilogue")
    reader = read("llama", f"#pass={number}&view=changes&layer={QUERY}&node=mixed_linear_default")
    expect(reader.view.get_by_role("heading")).to_contain_text("fuse-epilogue")
    expect(reader.page.get_by_label("Filter by layer")).to_have_value(QUERY)
    expect(reader.card.get_by_role("heading", level=2)).to_have_text("mixed_linear_default")
    expect(reader.lines("added").first).to_contain_text("mixed_linear_default")


def test_a_link_with_nonsense_shows_the_beginning(read: Any) -> None:
    reader = read("llama", "#pass=999&view=nothing&graph=9&node=nobody")
    expect(reader.page.get_by_role("tab", name="Layers")).to_have_attribute("aria-selected", "true")
    expect(reader.card).to_contain_text("No such node")


def test_back_and_forward_work(read: Any) -> None:
    reader = read("llama", "#pass=1&view=changes")
    reader.choose_pass(2)
    reader.choose_view("Program")
    reader.page.go_back()
    expect(reader.view.get_by_role("heading")).to_contain_text("canonicalize-linear")
    reader.page.go_back()
    expect(reader.view.get_by_role("heading")).to_contain_text("strip-guards")
    reader.page.go_forward()
    expect(reader.view.get_by_role("heading")).to_contain_text("canonicalize-linear")


def test_dark_is_toggled_and_remembered(read: Any) -> None:
    reader = read("llama")
    background = "getComputedStyle(document.body).backgroundColor"
    light = reader.page.evaluate(background)
    reader.page.keyboard.press("d")
    dark = reader.page.evaluate(background)
    assert dark != light
    reader.page.reload()
    expect(reader.passes.first).to_be_visible()
    assert reader.page.evaluate(background) == dark
    reader.page.get_by_role("button", name="Theme").click()
    assert reader.page.evaluate(background) == light


def test_the_theme_follows_the_system(read: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (
        read("llama", color_scheme=scheme).page.evaluate(background) for scheme in ("light", "dark")
    )
    assert light != dark


def test_the_matrix_shows_what_the_terminal_shows(read: Any) -> None:
    reader = read("llama", "#view=layers")
    reader.page.get_by_role("button", name="Expand all").click()
    (graph,) = measured_inspection().graphs
    table = reader.page.evaluate(MATRIX)
    marks = [touches(record, graph.layers) for record in graph.history.records]
    touching = [found for found in marks if found]
    for layer in graph.layers:
        expected = [
            found[layer.fqn].mark.replace("-", "−") if layer.fqn in found else "" for found in touching
        ]
        assert table[layer.fqn] == expected


def test_layers_alike_are_one_row_that_expands(read: Any) -> None:
    reader = read("llama", "#view=layers")
    row = reader.view.get_by_role("row").filter(has_text=ALL_QUERIES)
    expect(row).to_contain_text("×2")
    expect(row).to_contain_text("40.0–47.0")
    expect(reader.view.get_by_text(QUERY, exact=True)).to_have_count(0)
    expander = row.get_by_role("button", name=f"Expand {ALL_QUERIES}")
    expander.click()
    expect(reader.view.get_by_text(QUERY, exact=True)).to_be_visible()
    reader.view.get_by_role("button", name=f"Collapse {ALL_QUERIES}").click()
    expect(reader.view.get_by_text(QUERY, exact=True)).to_have_count(0)


def test_layers_are_sorted_by_a_column(read: Any) -> None:
    reader = read("llama", "#view=layers")
    first = reader.view.locator(".matrix tbody tr").first
    heading = reader.view.locator("[data-focus='column bytes']")
    heading.click()
    expect(reader.view.get_by_role("columnheader", name="bytes")).to_have_attribute("aria-sort", "ascending")
    expect(first).to_contain_text("k_proj")
    heading.click()
    expect(first).to_contain_text("gate_proj")
    heading.click()
    expect(first).to_contain_text("q_proj")


def test_a_cell_leads_to_the_pass_and_layer(read: Any) -> None:
    reader = read("llama", "#view=layers")
    number = number_of(REWRITE)
    reader.view.get_by_title(f"Pass {number} and {ALL_QUERIES}").click()
    assert reader.current() == {"pass": str(number), "view": "changes", "layer": ALL_QUERIES}
    expect(reader.view.get_by_role("heading")).to_contain_text(REWRITE)


def test_a_layer_leads_to_its_decisions_in_all_passes(read: Any) -> None:
    reader = read("llama", "#view=layers&layer=lm_head")
    reader.view.get_by_role("button", name="lm_head").click()
    expect(reader.view).to_contain_text("left as it was")
    expect(reader.view).to_contain_text("ignored: its name matches 'lm_head'")
    passes = reader.view.locator(".pass-link").all_text_contents()
    assert [name.split()[1] for name in passes] == ["canonicalize-linear", "select-scheme"]


def test_decisions_are_filtered_by_verdict(read: Any) -> None:
    reader = read("llama", f"#view=decisions&pass={number_of('select-scheme')}")
    expect(reader.view.locator(".verdict.applied").first).to_be_visible()
    reader.page.get_by_role("button", name="skipped 1").click()
    expect(reader.view.locator("tbody tr")).to_have_count(1)
    expect(reader.view.locator(".verdict")).to_have_text(["skipped"])


def test_decisions_alike_expand(read: Any) -> None:
    reader = read("llama", f"#view=decisions&pass={number_of('select-scheme')}")
    rows = reader.view.locator("tbody tr")
    before = rows.count()
    reader.view.get_by_role("button", name=f"Expand decisions about {ALL_QUERIES}").click()
    expect(rows).to_have_count(before + 2)


def test_charts_show_what_was_measured(read: Any) -> None:
    reader = read("llama", "#view=charts")
    errors = reader.view.get_by_role("img", name="Error of 15 layers")
    expect(errors.locator(".bars")).to_have_count(15)
    expect(errors.locator(".bar-missing")).to_have_count(1)
    expect(reader.view).to_contain_text("Lowest: 40.0 dB")
    expect(reader.view).to_contain_text("Not measured for 1 of 15 layers: lm_head")
    errors.locator(f"[data-layer='{QUERY}']").hover()
    expect(reader.page.locator("#tooltip")).to_contain_text("SQNR: 40.0 dB")
    reader.page.get_by_role("button", name="By value").click()
    expect(errors.locator(".bars").first).to_have_attribute("data-layer", QUERY)


def test_charts_say_what_was_not_measured(read: Any) -> None:
    reader = read("failing", "#view=charts&graph=0/1")
    expect(reader.view).to_contain_text("The error was not measured")
    expect(reader.view).to_contain_text("The outlier columns were not counted")


def test_neighbourhoods_are_drawn_and_their_nodes_clicked(read: Any) -> None:
    reader = read("llama", f"#view=neighbourhood&pass={number_of('fuse-epilogue')}")
    expect(reader.view).to_contain_text(f"drawn for {QUERY}, one of 2 alike")
    reader.view.locator("[data-node=mixed_linear_default]").first.click()
    expect(reader.card.get_by_role("heading", level=2)).to_have_text("mixed_linear_default")
    reader.page.keyboard.press("Escape")
    node = reader.view.locator("[data-node=mixed_gemm_default]").first
    node.focus()
    reader.page.keyboard.press("Enter")
    expect(reader.card.get_by_role("heading", level=2)).to_have_text("mixed_gemm_default")


def test_search_finds_nodes_layers_and_passes(read: Any) -> None:
    reader = read("llama")
    keyboard = reader.page.keyboard
    results = reader.page.get_by_role("option")
    keyboard.press("/")
    keyboard.type("fuse-epi")
    expect(results.first).to_contain_text("pass")
    keyboard.press("Enter")
    expect(reader.view.get_by_role("heading")).to_contain_text("fuse-epilogue")
    keyboard.press("/")
    keyboard.type("1 down")
    expect(results.first).to_contain_text("model.layers.1.mlp.down_proj")
    keyboard.press("Enter")
    assert reader.current()["layer"] == "model.layers.1.mlp.down_proj"
    keyboard.press("/")
    keyboard.type("mixed_gemm")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowUp")
    keyboard.press("Enter")
    expect(reader.card.get_by_role("heading", level=2)).to_have_text("mixed_gemm_default")
    expect(reader.view.locator(".token-name.chosen")).to_be_in_viewport()
    keyboard.press("/")
    keyboard.type("nothing is called this")
    expect(reader.page.get_by_role("dialog")).to_contain_text("Nothing is named like this")
    keyboard.press("Escape")
    expect(reader.page.get_by_role("dialog")).to_have_count(0)


def test_keys_move_between_passes_and_views(read: Any) -> None:
    reader = read("llama", "#pass=0")
    keyboard = reader.page.keyboard
    for key, number in (("j", "1"), ("ArrowDown", "2"), ("ArrowUp", "1"), ("k", "0"), ("k", "0")):
        keyboard.press(key)
        assert reader.current()["pass"] == number
    keyboard.press("4")
    assert reader.current()["view"] == "decisions"
    keyboard.press("?")
    expect(reader.page.get_by_role("dialog", name="Keys")).to_contain_text("Next pass")
    keyboard.press("j")
    assert reader.current()["pass"] == "0"
    keyboard.press("Escape")
    expect(reader.page.get_by_role("dialog")).to_have_count(0)


def test_letters_are_text_in_a_field(read: Any) -> None:
    reader = read("llama", "#pass=0&view=program")
    reader.page.keyboard.press("f")
    reader.page.keyboard.type("jkd")
    expect(reader.page.get_by_label("Filter by layer")).to_have_value("jkd")
    assert reader.current() == {"pass": "0", "view": "program", "layer": "jkd"}


def test_another_graph_is_selected(read: Any) -> None:
    reader = read("failing", "#view=layers")
    expect(reader.page.locator("#pass-list .flag").first).to_have_text("fuel spent")
    reader.page.get_by_label("Captured graph").select_option("0/1")
    assert reader.current()["graph"] == "0/1"
    expect(reader.page.locator("#pass-list .flag")).to_have_text(["1 violation"])
    reader.choose_pass(5)
    expect(reader.view).to_contain_text("its value is wrong")
    reader.open("#graph=0%2F0&view=layers&pass=1")
    expect(reader.page.get_by_label("Captured graph")).to_have_value("0/0")


def test_a_run_without_snapshots_is_readable(read: Any) -> None:
    reader = read("unrecorded")
    for view in ("Changes", "Program", "Layers", "Decisions", "Charts", "Neighbourhood"):
        reader.choose_view(view)
        expect(reader.view).not_to_be_empty()
    reader.page.get_by_label("Hide the inconsequential").uncheck()
    reader.choose_pass(1)
    reader.choose_view("Decisions")
    expect(reader.view).to_contain_text("noted")


def test_names_are_text_wherever_they_stand(read: Any) -> None:
    reader = read("hostile", "#pass=1")
    for view in ("Changes", "Program", "Layers", "Decisions", "Charts", "Neighbourhood"):
        reader.choose_view(view)
        expect(reader.view).not_to_be_empty()
        assert reader.page.locator("img").count() == 0
    reader.choose_view("Program")
    reader.view.locator(".token-name").first.click()
    expect(reader.card).to_contain_text("<img")
    assert reader.page.evaluate("window.broken") is None


def test_the_page_fits_a_narrow_window(read: Any) -> None:
    reader = read("llama", f"#pass={number_of(REWRITE)}&view=changes", viewport={"width": 800, "height": 700})
    for view in ("Changes", "Program", "Layers", "Decisions", "Charts", "Neighbourhood"):
        reader.choose_view(view)
        assert reader.page.evaluate("document.documentElement.scrollWidth") <= 800
        assert reader.view.bounding_box()["height"] > 200


def test_lines_wrap_again_when_the_width_changes(read: Any) -> None:
    reader = read("llama", f"#pass={number_of('fuse-epilogue')}&view=program&layer={QUERY}")
    assert reader.page.evaluate(OVERFLOW) <= 1
    reader.view.locator(".token-name").last.click()
    expect(reader.card).to_be_visible()
    reader.page.wait_for_function(f"({OVERFLOW})() <= 1")


def test_only_lines_in_sight_are_elements(read: Any) -> None:
    reader = read("deep", f"#pass={number_of(REWRITE)}&view=program")
    nodes = re.search(r"(\d+) nodes", reader.view.inner_text())
    assert nodes is not None
    assert int(nodes[1]) > 5000
    assert reader.view.locator(".line").count() < 150
    reader.page.evaluate("document.getElementById('view').scrollTop = 1e9")
    expect(reader.view.locator(".line-number").last).to_have_text(nodes[1])
    assert reader.view.locator(".line").count() < 150


@pytest.mark.parametrize("view", ["Changes", "Program", "Decisions", "Neighbourhood"])
def test_passes_of_32_blocks_are_shown_at_once(read: Any, view: str) -> None:
    reader = read("deep", "#pass=1")
    reader.choose_view(view)
    assert least_milliseconds(reader, "#pass-list [data-pass='5']", "#pass-list [data-pass='7']") < FLUID


@pytest.mark.parametrize("view", ["changes", "program", "layers", "charts"])
def test_views_of_32_blocks_are_shown_at_once(read: Any, view: str) -> None:
    reader = read("deep", f"#pass={number_of(REWRITE)}&view=decisions")
    assert least_milliseconds(reader, f"#tab-{view}", "#tab-decisions") < FLUID


def test_a_node_of_32_blocks_is_shown_at_once(read: Any) -> None:
    reader = read("deep", f"#pass={number_of(REWRITE)}&view=program")
    assert least_milliseconds(reader, ".token-name >> nth=5", ".token-name >> nth=8") < FLUID


def least_milliseconds(reader: Reader, selector: str, other: str) -> float:
    """The least time of a click, repeated while the machine is busy; the other is clicked in between."""
    times: list[float] = []
    while len(times) < ATTEMPTS and min(times, default=FLUID) >= FLUID:
        times.append(reader.page.locator(selector).evaluate(TIMED_CLICK))
        reader.page.locator(other).evaluate(TIMED_CLICK)
    return min(times)


def test_the_first_pass_that_changed_something_is_chosen_at_the_beginning(read: Any) -> None:
    (graph,) = measured_inspection().graphs
    first = next(record.index for record in graph.history.records if record.diff)
    reader = read("llama")
    expect(reader.page.locator("#pass-list [aria-current]")).to_have_attribute("data-pass", str(first))
    reader.choose_view("Changes")
    assert reader.lines("added").count() + reader.lines("removed").count() > 0


WIDTHS = [1280, 1440, 390]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_results_stand_before_passes_and_are_in_sight(read: Any, width: int, scheme: str) -> None:
    reader = read("llama", viewport={"width": width, "height": 900}, color_scheme=scheme)
    headings = reader.view.locator(".matrix thead th")
    texts = [text.strip() for text in headings.all_inner_texts()]
    assert texts[0] == "layer"
    by_pass = [place for place, text in enumerate(texts) if text[:1].isdigit()]
    assert min(by_pass) > max(place for place, text in enumerate(texts) if text in ("SQNR dB", "bytes"))
    if width > 1000:
        box = headings.nth(texts.index("SQNR dB")).bounding_box()
        assert box["x"] + box["width"] <= width
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_columns_of_passes_are_folded_and_shown_again(read: Any) -> None:
    reader = read("llama")
    before = reader.view.locator(".matrix thead th").count()
    reader.page.get_by_role("button", name="Hide passes").click()
    assert reader.view.locator(".matrix th.by-pass").count() == 0
    assert reader.view.locator(".matrix thead th").count() < before
    reader.page.get_by_role("button", name="Show passes").click()
    assert reader.view.locator(".matrix thead th").count() == before


def test_where_a_pass_did_nothing_all_passes_are_listed(read: Any) -> None:
    (graph,) = measured_inspection().graphs
    idle = next(record.index for record in graph.history.records if not record.diff)
    reader = read("llama", f"#pass={idle}&view=changes")
    listed = reader.view.get_by_role("list", name="What each pass changed").get_by_role("listitem")
    assert listed.count() == len(graph.history.records)
    reader.view.get_by_role("button", name=REWRITE).click()
    assert reader.current()["pass"] == str(number_of(REWRITE))
    assert reader.lines("added").count() > 0


def test_the_title_is_the_class_of_the_model(tmp_path: Path) -> None:
    import torch

    import mixq_compile as mixq

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    _, history = mixq.compile(mixq.capture(Encoder().eval(), (torch.randn(2, 32),)), force=True)
    history.save_html(tmp_path / "report.html")
    assert "<title>Encoder · mixq report</title>" in (tmp_path / "report.html").read_text()
