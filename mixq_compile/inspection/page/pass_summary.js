// One pass in a few words, above the views that are about it.

const MOST_OPERATORS = 8;

/** The pass's name, counts and findings. */
function passSummary(record) {
  const [name, options] = splitSpec(record.spec);
  return element(
    "div",
    { class: "pass-summary" },
    element(
      "h2",
      null,
      element("span", { class: "pass-number" }, record.index),
      name,
      options ? element("span", { class: "pass-options" }, options) : null,
    ),
    element("span", { class: "pass-facts" }, passFacts(record)),
    hasChanges(record.diff) ? operatorSummary(record.diff) : null,
    record.violations.map(({ node, message }) =>
      element("p", { class: "violation" }, node ? [nodeLink(node), ": "] : null, message),
    ),
  );
}

function operatorSummary(difference) {
  const counts = operatorCounts(difference);
  const parts = counts.slice(0, MOST_OPERATORS).map(([target, step]) =>
    element(
      "span",
      { class: "operator" },
      element("span", { class: step > 0 ? "ink-added" : "ink-removed" }, signed(step)),
      ` ${target.replace(/\.default$/, "")}`,
    ),
  );
  const rest = counts.length - parts.length;
  if (rest > 0) parts.push(element("span", { class: "quiet" }, `and ${rest} more`));
  const title = "By how much the number of calls of each operator changed";
  return parts.length > 0 ? element("span", { class: "operators", title }, parts) : null;
}

function signed(number) {
  return number < 0 ? `${MINUS}${-number}` : `+${number}`;
}
