// Names of nodes, layers and passes that lead to them.

function nodeLink(name, text = name) {
  return element("button", { type: "button", class: "link code", "data-node": name }, text);
}

/** The name of a layer, or another name that lies in it, which leads to its decisions. */
function layerLink(layer, text = layer) {
  return link(text, `What was decided about ${layer}`, () => go({ view: "decisions", layer }), "code");
}

function passLink({ index, spec }) {
  const open = () => go({ pass: index, view: "changes" });
  return link(`${index} ${splitSpec(spec)[0]}`, `Changes of pass ${index}`, open);
}
