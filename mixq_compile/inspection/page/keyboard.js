// Keys, and the sheet that lists them.

const COMMANDS = [
  { keys: ["j", "ArrowDown"], shown: "j ↓", text: "Next pass", run: () => stepPass(1) },
  { keys: ["k", "ArrowUp"], shown: "k ↑", text: "Previous pass", run: () => stepPass(-1) },
  { keys: VIEWS.map((_, index) => String(index + 1)), shown: "1…6", text: "Views, left to right", run: openView },
  { keys: ["t"], shown: "t", text: "Patch unified or side by side", run: () => setSplit(!taste.split) },
  { keys: ["/"], shown: "/", text: "Search nodes, layers and passes", run: openSearch },
  { keys: ["f"], shown: "f", text: "Filter by layer", run: () => byId("layer-filter").focus() },
  { keys: ["d"], shown: "d", text: "Light or dark", run: toggleTheme },
  { keys: ["Escape"], shown: "Escape", text: "Close the card", run: closeCard },
  { keys: ["?"], shown: "?", text: "These keys", run: openKeys },
];

function openView(key) {
  go({ view: VIEWS[Number(key) - 1][0] });
}

function openKeys() {
  const dialog = byId("keys");
  if (dialog.open) return;
  dialog.replaceChildren(
    element("h2", null, "Keys"),
    element(
      "dl",
      { class: "keys" },
      COMMANDS.map(({ shown, text }) => {
        const keys = shown.split(" ").map((key) => element("kbd", null, key));
        return element("div", null, element("dt", null, keys), element("dd", null, text));
      }),
    ),
    element("form", { method: "dialog" }, element("button", { class: "action" }, "Close")),
  );
  dialog.showModal();
}

function runCommand(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]") !== null) return;
  if (event.key === "Escape" && isTyping(event.target)) {
    event.target.blur();
    return;
  }
  // In the view and the card arrows scroll, as they do everywhere.
  const scrolls = event.target instanceof Element && event.target.closest("#view, #card") !== null;
  if (isTyping(event.target) || (scrolls && event.key.startsWith("Arrow"))) return;
  const command = COMMANDS.find(({ keys }) => keys.includes(event.key));
  if (command === undefined) return;
  event.preventDefault();
  command.run(event.key);
}

/** Chooses the node under the pointer or focus, wherever its name stands. */
function chooseNode(event) {
  const named = event.target instanceof Element ? event.target.closest("[data-node]") : null;
  if (named === null) return;
  if (event.type === "keydown") {
    if (event.key !== "Enter" && event.key !== " ") return;
    // A button makes its own click of these keys.
    if (named instanceof HTMLButtonElement) return;
    event.preventDefault();
  }
  // Text that was just selected in a line is to be copied and not followed.
  if (event.type === "click" && String(window.getSelection()) !== "") return;
  go({ node: named.dataset.node });
}

function listenToKeys() {
  document.addEventListener("keydown", runCommand);
  document.addEventListener("keydown", chooseNode);
  document.addEventListener("click", chooseNode);
}
