// A list of thousands of lines, of which only those in sight are elements.

const LINE_HEIGHT = 20;
const BEYOND = 400;

class LineList {
  #offsets = [0];
  #items = [];
  #shown = new Map();
  #elementOf = null;
  #sizer = element("div", { class: "lines", role: "list" });

  /** Fills the container, which must scroll. */
  constructor(container, label) {
    this.container = container;
    this.#sizer.setAttribute("aria-label", label);
    container.append(this.#sizer);
    container.addEventListener("scroll", () => this.#render(), { passive: true });
  }

  /** Characters that fit into this share of the list's width, beside so many pixels of gutter. */
  columns(share, gutter) {
    const probe = element("code", { class: "probe" }, "0".repeat(100));
    this.#sizer.append(probe);
    const width = probe.getBoundingClientRect().width / 100;
    probe.remove();
    return Math.max(24, Math.floor((this.#sizer.clientWidth * share - gutter) / width));
  }

  /** Shows items: `linesOf` tells how many lines each takes, `elementOf` makes its element. */
  show(items, linesOf, elementOf) {
    this.#items = items;
    this.#elementOf = elementOf;
    this.#offsets = [0];
    for (const item of items) this.#offsets.push(this.#offsets.at(-1) + linesOf(item) * LINE_HEIGHT);
    this.#sizer.style.height = `${this.#offsets.at(-1)}px`;
    this.#shown.clear();
    this.#sizer.replaceChildren();
    this.#render();
  }

  /** The item at the top of what is in sight. */
  get topIndex() {
    return this.#indexAt(this.container.scrollTop);
  }

  /** Scrolls to where an item is at the top. */
  scrollTo(index) {
    this.container.scrollTop = this.#offsets[index];
  }

  /** Draws the list again, with the item that stood at the top still there. */
  redraw(draw) {
    const index = this.topIndex;
    const hidden = this.container.scrollTop - this.#offsets[index];
    draw();
    this.container.scrollTop = this.#offsets[index] + hidden;
  }

  /** Brings an item into sight, a third from the top. */
  reveal(index) {
    this.container.scrollTop =
      this.#sizer.offsetTop + this.#offsets[index] - this.container.clientHeight / 3;
    this.#render();
  }

  #render() {
    const top = this.container.scrollTop - this.#sizer.offsetTop;
    const first = this.#indexAt(top - BEYOND);
    const last = this.#indexAt(top + this.container.clientHeight + BEYOND);
    for (const [index, shown] of this.#shown) {
      if (index >= first && index <= last) continue;
      shown.remove();
      this.#shown.delete(index);
    }
    // Elements stay in the order of the lines, so that text can be selected across them.
    const [above, below] = [document.createDocumentFragment(), document.createDocumentFragment()];
    const topmost = Math.min(...this.#shown.keys());
    for (let index = first; index <= last && index < this.#items.length; index += 1) {
      if (this.#shown.has(index)) continue;
      const made = this.#elementOf(this.#items[index], index);
      made.setAttribute("role", "listitem");
      made.style.top = `${this.#offsets[index]}px`;
      made.style.height = `${this.#offsets[index + 1] - this.#offsets[index]}px`;
      this.#shown.set(index, made);
      (index < topmost ? above : below).append(made);
    }
    this.#sizer.prepend(above);
    this.#sizer.append(below);
  }

  /** The item at this height, by bisection. */
  #indexAt(height) {
    let [low, high] = [0, this.#items.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#offsets[middle + 1] <= height) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}
