// Elements made from data. Text only ever becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function byId(identifier) {
  return document.getElementById(identifier);
}

function element(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svgElement(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets attributes; `on` holds listeners, and null, undefined and false leave an attribute out. */
function filled(target, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) target.addEventListener(event, listener);
    } else if (value !== null && value !== undefined && value !== false) {
      target.setAttribute(name, value === true ? "" : value);
    }
  }
  target.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return target;
}

/** A button that reads like text in a line. */
function link(text, title, listener, className = "") {
  return element("button", { type: "button", class: `link ${className}`, title, on: { click: listener } }, text);
}

function closeButton(id, title, listener) {
  const attributes = { type: "button", class: "close", id, title, "aria-label": title };
  return element("button", { ...attributes, on: { click: listener } }, "×");
}

/** Buttons of which one is pressed. Choices are [value, text, title]. */
function segmented(label, choices, chosen, choose) {
  return element(
    "div",
    { class: "segmented", role: "group", "aria-label": label },
    choices.map(([value, text, title]) =>
      element(
        "button",
        {
          type: "button",
          title,
          "aria-pressed": String(value === chosen),
          "data-focus": `${label} ${value}`,
          on: { click: () => choose(value) },
        },
        text,
      ),
    ),
  );
}

/** A button that shows and hides what stands for several. */
function expanderButton(name, opened, listener) {
  return element(
    "button",
    {
      type: "button",
      class: "expander",
      "aria-expanded": String(opened),
      "aria-label": `${opened ? "Collapse" : "Expand"} ${name}`,
      "data-focus": `expander ${name}`,
      on: { click: listener },
    },
    opened ? "▾" : "▸",
  );
}

/** Draws elements again; the one with the focus keeps it, known by its `data-focus`. */
function keepingFocus(draw) {
  const key = document.activeElement?.dataset?.focus;
  draw();
  if (key !== undefined) document.querySelector(`[data-focus="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

function emptyMessage(title, text) {
  return element("div", { class: "empty" }, element("strong", null, title), element("p", null, text ?? ""));
}

/** True while the focus is where letters are text and not commands. */
function isTyping(target) {
  return target instanceof HTMLElement && (target.matches("input, select, textarea") || target.isContentEditable);
}

/** Shows text beside the pointer; null hides it. */
function showTooltip(lines, x, y) {
  const tooltip = byId("tooltip");
  tooltip.hidden = lines === null;
  if (lines === null) return;
  tooltip.replaceChildren(...lines.map((line) => element("div", null, line)));
  const room = 12;
  tooltip.style.left = `${Math.max(4, Math.min(x + room, window.innerWidth - tooltip.offsetWidth - room))}px`;
  tooltip.style.top = `${Math.max(4, Math.min(y + room, window.innerHeight - tooltip.offsetHeight - room))}px`;
}
